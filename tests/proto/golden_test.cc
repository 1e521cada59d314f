// The bytes of the wire, written down: a change of them is a decision (a new version), not an
// accident.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>

#include "proto/codec.h"
#include "proto/envelope.h"
#include "proto/ticket.h"
#include "tests/proto/any_message.h"

namespace kvrelay::proto {
namespace {

std::filesystem::path Source(const std::string& name) {
  return std::filesystem::path(KVRELAY_SOURCE_DIR) / name;
}

std::string Hex(std::string_view bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (const char c : bytes) {
    hex.push_back(kDigits[static_cast<uint8_t>(c) >> 4]);
    hex.push_back(kDigits[static_cast<uint8_t>(c) & 15]);
  }
  return hex;
}

// golden.txt has a line for each message: its name and the bytes of its default value, in hex.
TEST(Golden, MessagesAreWhatTheyWere) {
  std::map<std::string, std::string> golden;
  std::ifstream file(Source("tests/proto/golden.txt"));
  ASSERT_TRUE(file.is_open());
  for (std::string name, hex; file >> name >> hex;) golden[name] = hex;
  for (const AnyMessage& message : AllMessages()) {
    const std::string name(message.name);
    const std::string hex = Hex(message.initial());
    EXPECT_EQ(hex, golden[name]) << "if that is meant: line \"" << name << " " << hex
                                 << "\" of golden.txt";
    golden.erase(name);
  }
  for (const auto& [name, hex] : golden) ADD_FAILURE() << "no message is called " << name;
}

template <typename Id>
Id Sixteen(uint8_t first) {
  Id id;
  for (size_t i = 0; i < id.bytes.size(); ++i) id.bytes[i] = static_cast<uint8_t>(first + i);
  return id;
}

// The examples of PROTOCOL.md are real.
TEST(Golden, TheExamplesInTheDocumentAreTheBytes) {
  std::ifstream file(Source("proto/PROTOCOL.md"));
  ASSERT_TRUE(file.is_open());
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::erase_if(text, [](char c) { return c == ' ' || c == '\n'; });
  const auto expect_shown = [&](const std::string& what, const std::string& example) {
    EXPECT_NE(text.find(example), std::string::npos) << what << " is " << example;
  };

  expect_shown("PING", Hex(EncodeEnvelope({Type::kPing, 7, false, 2000, Encode(Empty{})})));
  Release release;
  release.reader = Sixteen<EngineId>(0x10);
  release.reader_incarnation = 0x1122334455667788;
  release.leases = {Sixteen<LeaseId>(0xa0)};
  expect_shown("RELEASE", Hex(Encode(release)));
  expect_shown("ERROR", Hex(Encode(Error{Code::kLeaseEnded, "expired"})));
  Ticket ticket;
  ticket.owner = Sixteen<EngineId>(0x10);
  ticket.incarnation = 1;
  ticket.front = "tcp://10.0.0.7:7600";
  ticket.model = Sixteen<ContentHash>(0x20);
  ticket.prompt = {Sixteen<LeaseId>(0xa0), Sixteen<ContentHash>(0xb0), 256, 100};
  ticket.prefixes = {{Sixteen<LeaseId>(0xc0), Sixteen<ContentHash>(0xd0), 0, 256}};
  expect_shown("a ticket", EncodeTicket(ticket));
}

}  // namespace
}  // namespace kvrelay::proto
