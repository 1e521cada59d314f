#include "tests/sim/schedule.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "tests/sim/sim_prefill.h"

namespace kvrelay::sim {
namespace {

constexpr Duration kBusy = Millis(4000);  // requests and faults come
constexpr Duration kCalm =
    Millis(60'000);  // then everything must come to rest: longer than any cap
constexpr uint64_t kMaxEvents = 2'000'000;

EngineId MakeEngine(uint64_t n) {
  EngineId id;
  id.bytes[0] = static_cast<uint8_t>(n + 1);
  return id;
}

class Cluster {
 public:
  explicit Cluster(const ScheduleOptions& options)
      : options_(options),
        world_(options.seed),
        network_(world_),
        fabric_([this] { return world_.random.Next(); }) {
    Random& random = world_.random;
    if (options.faults) {
      network_.faults = {.lose = random.Chance(0.5) ? 0.0 : 0.02,
                         .repeat = random.Chance(0.5) ? 0.0 : 0.1,
                         .slow = random.Chance(0.5) ? 0.0 : 0.05};
      fabric_.script.refuse_connect = random.Chance(0.7) ? 0.0 : 0.2;
      fabric_.script.fail = random.Chance(0.5) ? 0.0 : 0.05;
      fabric_.script.stall = random.Chance(0.7) ? 0.0 : 0.03;
      fabric_.script.lose_chunk = random.Chance(0.7) ? 0.0 : 0.02;
      // Pulls that take as long as leases live.
      if (random.Chance(0.3)) fabric_.script.pause = Millis(20);
    }
    const bool mapped = random.Chance(0.6);
    const size_t prefills = 1 + random.Below(2);
    std::vector<std::string> fronts;
    for (size_t i = 0; i < prefills; ++i) {
      SimPrefill::Options prefill{.engine = MakeEngine(i),
                                  .prefix = "p" + std::to_string(i) + ":",
                                  .tp = 1 + static_cast<uint32_t>(random.Below(2)),
                                  .format = random.Chance(0.5) ? KvFormat::kNhd : KvFormat::kHnd,
                                  .mapped = mapped};
      if (options.faults && random.Chance(0.3)) prefill.ttl = Millis(100);
      if (options.faults && random.Chance(0.2)) prefill.cap = Millis(300);
      prefill_options_.push_back(prefill);
      prefills_.push_back(std::make_unique<SimPrefill>(host_, prefill));
      fronts.push_back(prefills_.back()->endpoint());
    }
    decode_options_ = {.engine = MakeEngine(100),
                       .prefix = "d0:",
                       .tp = 1 + static_cast<uint32_t>(random.Below(2)),
                       .format = random.Chance(0.5) ? KvFormat::kNhd : KvFormat::kHnd,
                       .mapped = mapped,
                       .prefills = fronts};
    decode_ = std::make_unique<SimDecode>(host_, decode_options_, outcomes_);
  }

  Outcomes Run() {
    Random& random = world_.random;
    const uint64_t requests = 4 + random.Below(10);
    for (uint64_t n = 0; n < requests; ++n) At(kBusy, [this, n] { Request(n); });
    if (options_.faults) {
      for (uint64_t n = random.Below(4); n > 0; --n) At(kBusy, [this] { Crash(); });
    }
    bool ran = world_.Run(TimePoint(kBusy), kMaxEvents);
    // Calm: what was sent is still under way, but nothing new goes wrong.
    network_.faults = {};
    fabric_.script.fail = fabric_.script.stall = fabric_.script.lose_chunk = 0;
    fabric_.script.refuse_connect = 0;
    ran = ran && world_.Run(TimePoint(kBusy + kCalm), kMaxEvents);
    if (!ran) Violate("the schedule does not come to an end");
    for (const auto& prefill : prefills_) {
      if (prefill && !prefill->AtRest()) Violate("a prefill engine leaks: " + prefill->State());
    }
    if (!decode_->AtRest()) Violate("the decode engine leaks: " + decode_->State());
    return outcomes_;
  }

 private:
  void At(Duration within, std::function<void()> fn) {
    const auto when =
        static_cast<int64_t>(world_.random.Below(static_cast<uint64_t>(within.count())));
    world_.Schedule(TimePoint(Duration(when)), std::move(fn));
  }

  void Request(uint64_t n) {
    Random& random = world_.random;
    Prompt prompt;
    if (random.Chance(0.6)) {
      prompt.prefix = 1 + random.Below(3);
      prompt.prefix_tokens = kBlockSize * static_cast<uint32_t>(prompt.prefix);
    }
    prompt.own = 100 + n;
    prompt.own_tokens = 1 + static_cast<uint32_t>(random.Below(7));
    const bool cancel = options_.faults && random.Chance(0.2);
    const Duration hold = Millis(static_cast<int64_t>(random.Below(500)));
    decode_->Request(prompt, cancel ? Millis(static_cast<int64_t>(random.Below(100))) : kCalm,
                     hold);
  }

  void Crash() {
    Random& random = world_.random;
    const Duration away = Millis(static_cast<int64_t>(random.Below(1500)));
    const uint64_t what = random.Below(4);
    const size_t i = random.Below(prefills_.size());
    if (what == 0) {
      decode_.reset();
      decode_ = std::make_unique<SimDecode>(host_, decode_options_, outcomes_);
    } else if (what == 1) {
      if (prefills_[i]) prefills_[i]->RestartRank1();
    } else {
      prefills_[i].reset();
      world_.Schedule(world_.Now() + away, [this, i] {
        if (!prefills_[i]) prefills_[i] = std::make_unique<SimPrefill>(host_, prefill_options_[i]);
      });
    }
  }

  void Violate(const std::string& what) {
    if (outcomes_.violation.empty()) outcomes_.violation = what;
  }

  const ScheduleOptions options_;
  World world_;
  Network network_;
  transport::FakeFabric fabric_;
  Host host_{.world = world_, .network = network_, .fabric = fabric_, .graveyard = {}};
  Outcomes outcomes_;
  std::vector<SimPrefill::Options> prefill_options_;
  SimDecode::Options decode_options_;
  std::vector<std::unique_ptr<SimPrefill>> prefills_;
  std::unique_ptr<SimDecode> decode_;
};

}  // namespace

Outcomes RunSchedule(const ScheduleOptions& options) { return Cluster(options).Run(); }

}  // namespace kvrelay::sim
