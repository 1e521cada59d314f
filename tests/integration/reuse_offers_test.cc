// Offers that a prefill daemon does not take: it computes all, and says why.
#include <gmock/gmock.h>

#include <filesystem>
#include <optional>
#include <thread>

#include "agent/engine_agent.h"
#include "agent/kv_connector.h"
#include "tests/integration/reuse_story.h"

namespace kvrelay::integration {
namespace {

using ::testing::HasSubstr;

class ReuseOffers : public ReuseStory {};

// An offer of a decode engine that is not there, and offers that do not fit the prompt.
TEST_F(ReuseOffers, AnOfferThatIsWrongIsAsGoodAsNone) {
  Begin();
  const DirectReader worker(prefill->endpoint());
  const std::vector<uint32_t> prompt = Text(100, 3);
  proto::Reuse offer = OfferOf(worker, "tcp://127.0.0.1:1", prompt, 89);
  offer.ticket.prompt.tokens = 90;
  EXPECT_EQ(Computes(prompt, offer), 100U) << "tokens of another hash";
  offer = OfferOf(worker, "tcp://127.0.0.1:1", prompt, 90);
  EXPECT_EQ(Computes(prompt, offer), 100U) << "nobody is there";
  offer.ticket.prompt.tokens = 100;
  EXPECT_EQ(Computes(prompt, offer), 100U) << "the last token is always computed";
  offer.dtype = DType::kFp16;
  EXPECT_EQ(Computes(prompt, offer), 100U);
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"kRefused\"}"), 2);
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"kIncompatible\"}"), 1);
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"kPeerUnreachable\"}"), 1);
}

// An engine in this process, of the daemons' model, whose numbers have scales of their request.
class ScaledOwner {
 public:
  static constexpr uint32_t kBlock = 16;

  ScaledOwner(const ContentHash& model, const std::string& run_dir) {
    std::filesystem::create_directory(run_dir);
    std::filesystem::permissions(run_dir, std::filesystem::perms::owner_all);
    KvLayout layout = KvLayout::Dense(KvFormat::kNhd, DType::kFp32, 6, 4, 32, kBlock, 16);
    layout.scales.with_request = true;
    region_.emplace(Region::AllocateHost(layout.dense_bytes(), "scaled").value());
    agent::EngineAgentOptions options;
    options.model = model;
    options.block_size = kBlock;
    options.run_dir = run_dir;
    auto made = agent::EngineAgent::Create(
        options, {{layout, KvShard::Make(6, 4, 1, 0).value(), {&*region_}}}, pool_, prefixes_);
    EXPECT_TRUE(made.has_value()) << made.error().ToString();
    agent_ = std::move(*made);
    connector_.emplace(*agent_);
    agent_->Run();
  }
  ~ScaledOwner() { agent_->Shutdown(); }

  const std::string& front() const { return agent_->endpoint(); }
  // Of tokens [0, n) of a prompt.
  Result<LeaseId> Offer(const ContentHash& hash, uint32_t n) {
    KvScales scales;
    scales.k.assign(6, 0.5F);
    scales.v.assign(6, 2.0F);
    connector_->Offer({.blocks = {pool_->Allocate((n + kBlock - 1) / kBlock).value(), 0},
                       .first_token = 0,
                       .tokens = n,
                       .hash = hash,
                       .prefix = false,
                       .finished = true,
                       .scales = {scales}});
    const TimePoint end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (std::chrono::steady_clock::now() < end) {
      const auto offers = connector_->GetFinished().offers;
      std::this_thread::sleep_for(Millis(1));
      if (offers.empty()) continue;
      KVRELAY_ASSIGN_OR_RETURN(const proto::Ticket ticket, offers.front().second);
      agent_->Writer(0, ticket.prompt.lease)->Publish({n, n, 0});
      return ticket.prompt.lease;
    }
    return Error(Code::kDeadlineExceeded, "no offer");
  }

 private:
  std::optional<Region> region_;
  std::shared_ptr<BlockPool> pool_ = BlockPool::Create(16);
  SystemPrefixStore prefixes_{4};
  std::unique_ptr<agent::EngineAgent> agent_;
  std::optional<agent::KvConnector> connector_;
};

// What a number means is in its scale, and the prefill daemon's cache has none: converted numbers
// are not what it would have computed.
TEST_F(ReuseOffers, NumbersWithScalesOfTheirOwnAreNotReused) {
  Begin();
  const DirectReader worker(prefill->endpoint());
  ScaledOwner owner(worker.owner().model, run_dir() + "/scaled");
  const std::vector<uint32_t> prompt = Text(100, 3);
  proto::Reuse offer = OfferOf(DirectReader(owner.front()), owner.front(), prompt, 90);
  const auto lease = owner.Offer(offer.ticket.prompt.hash, 90);
  ASSERT_TRUE(lease.has_value()) << lease.error().ToString();
  offer.ticket.prompt.lease = *lease;
  EXPECT_EQ(Computes(prompt, offer), 100U);
  EXPECT_EQ(Count(*prefill, "kvrelay_reuse_total{outcome=\"kIncompatible\"}"), 1);
  EXPECT_THAT(prefill->log(), HasSubstr("have other scales than this cache's"));
}

}  // namespace
}  // namespace kvrelay::integration
