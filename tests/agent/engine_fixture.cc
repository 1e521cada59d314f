#include "tests/agent/engine_fixture.h"

#include <cctype>
#include <chrono>
#include <thread>
#include <utility>

#include "transport/ucx_one_sided.h"

namespace kvrelay::agent {

void TestEngine::Start(EngineAgentOptions options, const std::vector<RankCache>& caches,
                       HostXferBuffer* host) {
  options.model.bytes[0] = 7;
  options.model_name = "made up";
  auto made = EngineAgent::Create(std::move(options), caches, pool, prefixes);
  ASSERT_TRUE(made.has_value()) << made.error().ToString();
  agent = std::move(*made);
  connector = std::make_unique<KvConnector>(*agent, host);
  agent->Run();
}

void TestEngine::Stop() {
  if (agent) agent->Shutdown();
  connector.reset();
  agent.reset();
}

KvConnector::Finished TestEngine::WaitFor(
    const std::function<bool(const KvConnector::Finished&)>& over) {
  KvConnector::Finished all;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!over(all) && std::chrono::steady_clock::now() < end) {
    KvConnector::Finished more = connector->GetFinished();
    for (auto& offer : more.offers) all.offers.push_back(std::move(offer));
    for (auto& load : more.loads) all.loads.push_back(std::move(load));
    all.drained.insert(all.drained.end(), more.drained.begin(), more.drained.end());
    std::this_thread::sleep_for(Millis(1));
  }
  EXPECT_TRUE(over(all));
  return all;
}

proto::Ticket TestEngine::Offer(OfferRequest offer) {
  offer.hash.bytes[0] = 9;
  offer.finished = true;
  connector->Offer(std::move(offer));
  auto offers = WaitFor([](const auto& done) { return !done.offers.empty(); }).offers;
  const auto& ticket = offers.at(0).second;
  EXPECT_TRUE(ticket.has_value()) << ticket.error().ToString();
  return ticket.value();
}

KvConnector::LoadId TestEngine::StartLoad(const proto::Ticket& ticket, HeldTables blocks) {
  return connector->StartLoadKv({.ticket = ticket,
                                 .blocks = std::move(blocks),
                                 .deadline = agent->env().clock.Now() + std::chrono::seconds(25)});
}

void TransportsTest::SetUp() {
  if (GetParam() != "ucx-get") return;
  const auto lanes = transport::FindOneSidedLanes("");
  if (!lanes.has_value()) GTEST_SKIP() << lanes.error().message();
}

std::string InstanceName(const testing::TestParamInfo<std::string>& transport) {
  std::string name;
  bool begins = true;
  for (const char c : transport.param) {
    if (c != '-') name += begins ? static_cast<char>(std::toupper(c)) : c;
    begins = c == '-';
  }
  return name;
}

}  // namespace kvrelay::agent
