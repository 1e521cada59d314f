// What tests of whole engines share: an agent and a connector over some ranks' caches, on real
// sockets and transports.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "agent/host_xfer_buffer.h"
#include "agent/kv_connector.h"
#include "tests/common/temp_dir.h"

namespace kvrelay::agent {

// One engine. What is derived from it owns the caches' memory: it calls Start in its constructor,
// and Stop in its destructor.
class TestEngine {
 public:
  // Waits until `over` holds of all that finished meanwhile.
  KvConnector::Finished WaitFor(const std::function<bool(const KvConnector::Finished&)>& over);
  // Offers what is written, or will be, and waits for the ticket. Fills in what is the same for all
  // tests: the prompt's hash, and that nothing will be added.
  proto::Ticket Offer(OfferRequest offer);
  // Loads a ticket's prompt within a time that no test sees the end of.
  KvConnector::LoadId StartLoad(const proto::Ticket& ticket, HeldTables blocks);

  std::shared_ptr<BlockPool> pool;
  SystemPrefixStore prefixes{4};
  std::unique_ptr<EngineAgent> agent;
  std::unique_ptr<KvConnector> connector;

 protected:
  explicit TestEngine(uint32_t blocks) : pool(BlockPool::Create(blocks)) {}
  // `options` without what is the same for all.
  void Start(EngineAgentOptions options, const std::vector<RankCache>& caches,
             HostXferBuffer* host = nullptr);
  void Stop();
};

// A test over some of the transports, with a folder for their sockets.
class TransportsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override;

  const tests::TempDir folder_;
};

// "ucx-get" is the instance UcxGet.
std::string InstanceName(const testing::TestParamInfo<std::string>& transport);

}  // namespace kvrelay::agent
