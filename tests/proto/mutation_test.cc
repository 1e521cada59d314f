// Messages that went bad on the way, by the hundred thousand. What counts is that nothing crashes
// (ASan, UBSan) and that what is accepted is a message.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "proto/codec.h"
#include "proto/envelope.h"
#include "proto/ticket.h"
#include "tests/proto/any_message.h"

namespace kvrelay::proto {
namespace {

// One to four changes: bits, bytes that mean something in msgpack, insertions, deletions, copies of
// other parts.
void Mutate(Random& random, std::string& bytes) {
  constexpr char kTelling[] =
      "\x00\x01\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xc3\xc4\xc5\xc6\xc7\xc9"
      "\xca\xcb\xcc\xcd\xce\xcf\xd0\xd3\xd9\xda\xdb\xdc\xdd\xde\xdf\xe0\xff";
  for (uint64_t changes = 1 + random() % 4; changes > 0 && !bytes.empty(); --changes) {
    const size_t at = random() % bytes.size();
    const size_t size = random() % std::min<size_t>(bytes.size() - at + 1, 16);
    switch (random() % 6) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
        break;
      case 1:
        bytes[at] = kTelling[random() % (sizeof(kTelling) - 1)];
        break;
      case 2:
        bytes.insert(at, 1, kTelling[random() % (sizeof(kTelling) - 1)]);
        break;
      case 3:
        bytes.erase(at, size);
        break;
      case 4:
        bytes.insert(random() % bytes.size(), bytes.substr(at, size));
        break;
      default:
        bytes.resize(at);
    }
  }
}

TEST(Mutation, OfAMessageIsRefusedOrStillAMessage) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Random random(seed);
  constexpr int kMessages = 6000;  // of each type
  for (const AnyMessage& message : AllMessages()) {
    const std::string name(message.name);
    for (int i = 0; i < kMessages; ++i) {
      std::string bytes = message.random(random);
      Mutate(random, bytes);
      const std::vector<char> exact(bytes.begin(), bytes.end());  // ASan sees reads past its end
      const Result<std::string> again = message.recode({exact.data(), exact.size()});
      if (!again.has_value()) {
        ASSERT_TRUE(again.error().message().starts_with(name + ": ")) << again.error().ToString();
        ASSERT_EQ(again.error().code(), Code::kInvalidArgument);
      } else {
        const Result<std::string> twice = message.recode(*again);
        ASSERT_TRUE(twice.has_value()) << twice.error().ToString();
        ASSERT_EQ(*twice, *again);
      }
    }
  }
}

TEST(Mutation, OfAnEnvelopeIsRefusedOrStillAnEnvelope) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Random random(seed);
  int accepted = 0;
  for (int i = 0; i < 40'000; ++i) {
    const std::string body = Encode(RandomMessage<Claim>(random));
    std::string bytes = EncodeEnvelope({static_cast<Type>(random() % 20), 1 + random() % 100,
                                        random() % 2 == 0, static_cast<uint32_t>(random()), body});
    Mutate(random, bytes);
    const std::vector<char> exact(bytes.begin(), bytes.end());
    const auto decoded = DecodeEnvelope({exact.data(), exact.size()});
    if (!decoded) {
      ASSERT_FALSE(decoded.error().status.ok());
      ASSERT_FALSE(decoded.error().reason.empty());
    } else {
      ++accepted;
      (void)Decode<Claim>(decoded->body);
    }
  }
  EXPECT_GT(accepted, 1000) << "bodies are opaque to the envelope";
}

TEST(Mutation, OfATicketIsRefused) {
  const uint64_t seed = TestSeed();
  SCOPED_TRACE("KVRELAY_SEED=" + std::to_string(seed));
  Random random(seed);
  for (int i = 0; i < 10'000; ++i) {
    const std::string text = EncodeTicket(RandomMessage<Ticket>(random));
    std::string bad = text;
    Mutate(random, bad);
    if (bad == text) continue;
    ASSERT_FALSE(DecodeTicket(bad).has_value()) << text << "\n" << bad;
  }
}

}  // namespace
}  // namespace kvrelay::proto
