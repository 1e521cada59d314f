// What tests of one transport share: an owner in another process, and reads from it.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "tests/transport/child.h"
#include "tests/transport/node.h"

namespace kvrelay::transport {

// A copy of the same 4 MiB again and again: many gigabytes, which no deadline of a test would ever
// see the end of.
CopyPlan Endless();

std::map<std::string, uint64_t> CountersOf(Node& node);

class OwnerTest : public testing::Test {
 protected:
  // `path` as Node takes it.
  OwnerTest(std::string path, uint64_t kv_bytes) : path_(std::move(path)), kv_bytes_(kv_bytes) {}

  // Starts an owner process with a lease on record 0 and the KV of Fill(seed); its spec is in
  // `spec_`.
  std::unique_ptr<Child> StartOwner(uint64_t seed);

  // Reads and waits.
  static Completion Read(Node& reader, PeerHandle peer, NextPortion next, GuardRef guard,
                         Duration timeout = std::chrono::seconds(20));
  static Completion Read(Node& reader, PeerHandle peer, CopyPlan plan, GuardRef guard,
                         Duration timeout = std::chrono::seconds(20)) {
    return Read(reader, peer, Whole(std::move(plan)), guard, timeout);
  }
  // Why the reader cannot connect to it, or "connected".
  static std::string WhyNot(Node& reader, const PeerSpec& spec,
                            Duration timeout = std::chrono::seconds(5));

  TempDir dir_;  // for sockets
  PeerSpec spec_;

 private:
  const std::string path_;
  const uint64_t kv_bytes_;
};

}  // namespace kvrelay::transport
