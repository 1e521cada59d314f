#include "tools/common/keys.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

#include "base/unique_fd.h"

namespace kvrelay::tools {
namespace {

using transport::CurveIdentity;
using transport::CurveKey;

constexpr size_t kMaxFileBytes = 4 << 20;

Status Bad(const std::string& where, const std::string& what) {
  return {Code::kInvalidArgument, where + ": " + what};
}

// What is left of a file's line without its comment.
struct Line {
  std::string where;  // "FILE:3"
  std::vector<std::string> words;
};

// The lines that are not empty. `secret`: only the file's owner may be able to read it.
Result<std::vector<Line>> ReadLines(const std::string& path, bool secret) {
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat facts {};
  if (!file || fstat(file.get(), &facts) != 0) return Error(Bad(path, std::strerror(errno)));
  if (!S_ISREG(facts.st_mode)) return Error(Bad(path, "is no file"));
  if (secret && (facts.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    return Error(Bad(path, "others can read this secret key; chmod 600 ends that"));
  }
  std::string text(kMaxFileBytes + 1, '\0');
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t got = read(file.get(), text.data() + size, text.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return Error(Bad(path, std::strerror(errno)));
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  if (size > kMaxFileBytes) {
    return Error(Bad(path, "is longer than " + std::to_string(kMaxFileBytes) + " bytes"));
  }
  text.resize(size);

  std::vector<Line> lines;
  std::istringstream in(std::move(text));
  std::string line;
  for (size_t number = 1; std::getline(in, line); ++number) {
    std::istringstream words(line.substr(0, line.find('#')));
    Line parsed{.where = path + ":" + std::to_string(number), .words = {}};
    for (std::string word; words >> word;) parsed.words.push_back(std::move(word));
    if (!parsed.words.empty()) lines.push_back(std::move(parsed));
  }
  return lines;
}

// Messages do not quote the file: it is secret.
Result<CurveIdentity> ReadKeyFile(const std::string& path) {
  constexpr std::string_view kWrong = "'secret KEY' belongs here, as kvrelay keygen writes it";
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<Line> lines, ReadLines(path, true));
  if (lines.empty()) return Error(Bad(path, "has no key; kvrelay keygen makes key files"));
  const Line& first = lines.front();
  if (first.words.size() != 2 || first.words[0] != "secret") {
    return Error(Bad(first.where, std::string(kWrong)));
  }
  const Result<CurveKey> key = transport::KeyFromText(first.words[1]);
  if (!key) return Error(Bad(first.where, std::string(kWrong)));
  if (lines.size() > 1) return Error(Bad(lines[1].where, "a key file has one key"));
  return transport::IdentityOf(*key);
}

Status ReadAllowedKeys(const std::string& path, CurveIdentity* identity) {
  KVRELAY_ASSIGN_OR_RETURN(const std::vector<Line> lines, ReadLines(path, false));
  for (const Line& line : lines) {
    const Result<CurveKey> key = transport::KeyFromText(line.words.front());
    if (!key) return Bad(line.where, key.error().message());
    identity->allowed.insert(*key);
  }
  return Status::Ok();
}

}  // namespace

Result<CurveKey> WriteNewKeyFile(const std::string& path) {
  const CurveIdentity identity = transport::NewCurveIdentity();
  const UniqueFd file(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!file && errno == EEXIST) {
    return Error(Bad(path, "is there already, and a key is not to be lost by mistake"));
  }
  if (!file) return Error(Bad(path, std::strerror(errno)));
  const std::string text = "# public " + transport::KeyToText(identity.public_key) + "\nsecret " +
                           transport::KeyToText(identity.secret_key) + "\n";
  errno = 0;
  if (write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      fsync(file.get()) != 0) {
    const std::string why = errno != 0 ? std::strerror(errno) : "was not written whole";
    unlink(path.c_str());
    return Error(Bad(path, why));
  }
  return identity.public_key;
}

void KeyFlags::Declare(FlagSet& flags) {
  flags.Text("key_file", &key_file, "FILE",
             "our key pair, made by kvrelay keygen: all calls are encrypted, and nobody without an "
             "allowed key gets or gives anything");
  flags.Text("allowed_keys", &allowed_keys, "FILE",
             "public keys, one a line, that are allowed beside our own; when empty those of the "
             "endpoints in the flags");
}

Result<std::shared_ptr<const CurveIdentity>> KeyFlags::Load(std::span<const Endpoint> named) const {
  if (key_file.empty()) {
    if (!allowed_keys.empty()) {
      return Error(Code::kInvalidArgument, "--allowed_keys goes with --key_file");
    }
    for (const Endpoint& endpoint : named) {
      if (!endpoint.key.has_value()) continue;
      return Error(Code::kInvalidArgument, endpoint.ToString() + " asks for keys: --key_file=FILE");
    }
    return nullptr;
  }
  KVRELAY_ASSIGN_OR_RETURN(CurveIdentity identity, ReadKeyFile(key_file));
  if (!allowed_keys.empty()) {
    KVRELAY_RETURN_IF_ERROR(ReadAllowedKeys(allowed_keys, &identity));
  }
  for (const Endpoint& endpoint : named) {
    if (!endpoint.key.has_value()) {
      return Error(Code::kInvalidArgument, endpoint.ToString() +
                                               " names no key; with --key_file it must: "
                                               "tcp://HOST:PORT#KEY");
    }
    if (allowed_keys.empty()) identity.allowed.insert(*endpoint.key);
    if (!identity.Allows(*endpoint.key)) {
      return Error(Bad(allowed_keys, "the key of " + endpoint.ToString() + " is not there"));
    }
  }
  return std::make_shared<const CurveIdentity>(std::move(identity));
}

}  // namespace kvrelay::tools
