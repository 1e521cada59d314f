// Key files and lists of allowed keys: as they are written, and every way to get them wrong.
#include "tools/common/keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "tests/common/temp_dir.h"

namespace kvrelay::tools {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using transport::CurveKey;
using transport::KeyToText;

CurveKey SomeKey() { return transport::NewCurveIdentity().public_key; }

Endpoint At(const std::string& text) { return ParseEndpoint(text, AnyPort::kForbidden).value(); }
Endpoint At(const CurveKey& key) { return At("tcp://10.0.0.7:7601#" + KeyToText(key)); }

class KeysTest : public ::testing::Test {
 protected:
  KeysTest() {
    flags_.key_file = Path("own.key");
    own_ = WriteNewKeyFile(flags_.key_file).value();
  }

  std::string Path(const std::string& name) const { return folder_.path() + "/" + name; }
  std::string File(const std::string& name, const std::string& text, mode_t mode = 0600) const {
    std::ofstream(Path(name)) << text;
    EXPECT_EQ(::chmod(Path(name).c_str(), mode), 0);
    return Path(name);
  }
  std::string LoadError(const std::vector<Endpoint>& named = {}) const {
    const auto identity = flags_.Load(named);
    if (identity) return "no error";
    EXPECT_EQ(identity.error().code(), Code::kInvalidArgument);
    return identity.error().message();
  }

  const tests::TempDir folder_;
  KeyFlags flags_;
  CurveKey own_{};
};

TEST_F(KeysTest, ANewPairIsReadBack) {
  struct stat facts {};
  ASSERT_EQ(::stat(flags_.key_file.c_str(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0777, 0600U);
  std::ostringstream text;
  text << std::ifstream(flags_.key_file).rdbuf();
  EXPECT_THAT(text.str(), StartsWith("# public " + KeyToText(own_) + "\nsecret "));
  const auto identity = flags_.Load({});
  ASSERT_TRUE(identity) << identity.error().ToString();
  EXPECT_EQ((*identity)->public_key, own_);
  EXPECT_TRUE((*identity)->Allows(own_));
  EXPECT_FALSE((*identity)->Allows(SomeKey()));
}

TEST_F(KeysTest, APairIsNeverOverwritten) {
  const auto again = WriteNewKeyFile(flags_.key_file);
  ASSERT_FALSE(again);
  EXPECT_THAT(again.error().message(), StartsWith(flags_.key_file + ": is there already"));
  EXPECT_EQ((*flags_.Load({}))->public_key, own_);
  EXPECT_THAT(WriteNewKeyFile(Path("no/such/folder")).error().message(), HasSubstr("No such file"));
}

TEST_F(KeysTest, WithoutAFileThereAreNoKeys) {
  flags_.key_file.clear();
  const std::vector<Endpoint> plain = {At("tcp://10.0.0.7:7601")};
  EXPECT_EQ(flags_.Load(plain).value(), nullptr);
  const Endpoint keyed = At(SomeKey());
  EXPECT_EQ(LoadError({keyed}), keyed.ToString() + " asks for keys: --key_file=FILE");
  flags_.allowed_keys = "x";
  EXPECT_EQ(LoadError(), "--allowed_keys goes with --key_file");
}

TEST_F(KeysTest, WithoutAListThoseThatWereNamedAreAllowed) {
  const CurveKey peer = SomeKey();
  const auto identity = flags_.Load(std::vector{At(peer)});
  ASSERT_TRUE(identity) << identity.error().ToString();
  EXPECT_TRUE((*identity)->Allows(peer));
  EXPECT_FALSE((*identity)->Allows(SomeKey()));
  EXPECT_THAT(LoadError({At("tcp://10.0.0.7:7601")}),
              StartsWith("tcp://10.0.0.7:7601 names no key"));
}

TEST_F(KeysTest, AListHasAKeyALineAndComments) {
  const CurveKey a = SomeKey();
  const CurveKey b = SomeKey();
  flags_.allowed_keys =
      File("allowed",
           "# ours\n\n" + KeyToText(a) + "\n  " + KeyToText(b) + "\tnode 7 # in rack 2\r\n", 0644);
  const auto identity = flags_.Load(std::vector{At(a)});
  ASSERT_TRUE(identity) << identity.error().ToString();
  EXPECT_TRUE((*identity)->Allows(a));
  EXPECT_TRUE((*identity)->Allows(b));
  EXPECT_FALSE((*identity)->Allows(SomeKey()));
  const Endpoint other = At(SomeKey());
  EXPECT_EQ(LoadError({other}),
            flags_.allowed_keys + ": the key of " + other.ToString() + " is not there")
      << "a list is all there is";
}

TEST_F(KeysTest, AnEmptyListAllowsOurselvesOnly) {
  flags_.allowed_keys = File("allowed", "");
  const auto identity = flags_.Load({});
  ASSERT_TRUE(identity) << identity.error().ToString();
  EXPECT_TRUE((*identity)->Allows(own_));
  EXPECT_TRUE((*identity)->allowed.empty());
}

TEST_F(KeysTest, ABadLineOfAListIsNamedWithItsNumber) {
  const std::string good = KeyToText(SomeKey());
  for (const std::string& bad :
       {std::string("node7"), good.substr(1), good + "A", "secret " + good}) {
    flags_.allowed_keys = File("allowed", good + "\n# comment\n" + bad + "\n");
    EXPECT_THAT(LoadError(), StartsWith(flags_.allowed_keys + ":3: '")) << bad;
    EXPECT_THAT(LoadError(), HasSubstr("is not a public key")) << bad;
  }
  flags_.allowed_keys = Path("nowhere");
  EXPECT_EQ(LoadError(), Path("nowhere") + ": No such file or directory");
  flags_.allowed_keys = folder_.path();
  EXPECT_EQ(LoadError(), folder_.path() + ": is no file");
  flags_.allowed_keys = File("long", std::string((4 << 20) + 1, '\n'));
  EXPECT_THAT(LoadError(), HasSubstr("is longer than 4194304 bytes"));
}

TEST_F(KeysTest, AKeyFileIsSecretAndHasOneKey) {
  const std::string key = KeyToText(SomeKey());
  for (const mode_t mode : {0640, 0604, 0660}) {
    flags_.key_file = File("open.key", "secret " + key + "\n", mode);
    EXPECT_THAT(LoadError(), HasSubstr("chmod 600"));
  }
  flags_.key_file = Path("nowhere");
  EXPECT_EQ(LoadError(), Path("nowhere") + ": No such file or directory");
  flags_.key_file = File("empty.key", "# nothing\n");
  EXPECT_THAT(LoadError(), HasSubstr("has no key"));
  flags_.key_file = File("two.key", "secret " + key + "\nsecret " + key + "\n");
  EXPECT_EQ(LoadError(), Path("two.key") + ":2: a key file has one key");
  for (const std::string& bad :
       {key, "public " + key, "secret " + key + "A", "secret " + key + " x", std::string("secret"),
        std::string("secret \xff")}) {
    flags_.key_file = File("bad.key", "\n" + bad + "\n");
    EXPECT_THAT(LoadError(), StartsWith(Path("bad.key") + ":2: 'secret KEY' belongs here")) << bad;
    EXPECT_THAT(LoadError(), Not(HasSubstr(key))) << "it may be the secret";
  }
}

}  // namespace
}  // namespace kvrelay::tools
