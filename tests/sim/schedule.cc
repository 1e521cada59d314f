#include "tests/sim/schedule.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "tests/sim/sim_prefill.h"

namespace kvrelay::sim {
namespace {

constexpr Duration kBusy = Millis(4000);  // requests and faults come
constexpr Duration kLook = Millis(100);   // at everybody's leases, meanwhile
constexpr Duration kCalm =
    Millis(60'000);  // then everything must come to rest: longer than any cap
constexpr Duration kAgain = Millis(40'000);  // requests once more; longer than any is set aside
constexpr Duration kShortTtl = Millis(100);  // less than a slow pull
constexpr uint64_t kMaxEvents = 2'000'000;

class Cluster {
 public:
  explicit Cluster(const ScheduleOptions& options)
      : options_(options),
        world_(options.seed),
        network_(world_),
        fabric_([this] { return world_.random.Next(); }) {
    Random& random = world_.random;
    if (options.faults) {
      network_.between = DrawFaults();
      network_.inside = DrawFaults();
      fabric_.script.refuse_connect = random.Chance(0.7) ? 0.0 : 0.2;
      fabric_.script.fail = random.Chance(0.5) ? 0.0 : 0.05;
      fabric_.script.stall = random.Chance(0.7) ? 0.0 : 0.03;
      fabric_.script.lose_chunk = random.Chance(0.7) ? 0.0 : 0.02;
      // Pulls that take as long as leases live; copies that go on after they were cancelled.
      if (random.Chance(0.3)) fabric_.script.pause = Millis(20);
      if (random.Chance(0.3)) fabric_.script.cancel_delay = Millis(20);
    } else if (random.Chance(0.5)) {
      fabric_.script.pause = Millis(20);
    }
    const bool mapped = random.Chance(0.6);
    const size_t prefills = 1 + random.Below(2);
    std::vector<std::string> fronts;
    for (size_t i = 0; i < prefills; ++i) {
      SimPrefill::Options prefill{.engine = MakeEngineId(i + 1),
                                  .prefix = "p" + std::to_string(i) + ":",
                                  .tp = 1 + static_cast<uint32_t>(random.Below(2)),
                                  .format = random.Chance(0.5) ? KvFormat::kNhd : KvFormat::kHnd,
                                  .mapped = mapped,
                                  .blocks = DrawBlocks(),
                                  .on_ticket = {},
                                  .on_finished = {}};
      if ((options.faults || !options.cancels) && random.Chance(0.3)) prefill.ttl = kShortTtl;
      if (options.faults && random.Chance(0.2)) prefill.cap = Millis(300);
      prefill.on_ticket = [this](const Prompt& prompt, const proto::Ticket& ticket) {
        OnTicket(prompt, ticket);
      };
      prefill.on_finished = [this](const proto::Ticket& ticket) {
        if (second_) second_->SetReady(ticket);
      };
      prefill_options_.push_back(prefill);
      prefills_.push_back(std::make_unique<SimPrefill>(host_, prefill, nullptr));
      fronts.push_back(prefills_.back()->endpoint());
    }
    decode_options_ = {.engine = MakeEngineId(101),
                       .prefix = "d0:",
                       .tp = 1 + static_cast<uint32_t>(random.Below(2)),
                       .format = random.Chance(0.5) ? KvFormat::kNhd : KvFormat::kHnd,
                       .mapped = mapped,
                       .max_asked_bytes = random.Chance(0.5) ? 0 : 32 + random.Below(512),
                       .blocks = DrawBlocks(),
                       .prefixes = 1 + static_cast<uint32_t>(random.Below(2)),
                       .prefills = fronts};
    decode_ = std::make_unique<SimDecode>(host_, decode_options_, outcomes_);
    if (options.faults && random.Chance(0.4)) {
      SimDecode::Options second = decode_options_;
      second.engine = MakeEngineId(102);
      second.prefix = "d1:";
      second.tp = 1 + static_cast<uint32_t>(random.Below(2));
      second_ = std::make_unique<SimDecode>(host_, second, outcomes_);
    }
  }

  Outcomes Run() {
    Random& random = world_.random;
    const uint64_t requests = 3 + random.Below(8);
    // Now and then, or all at once.
    const Duration arrivals = random.Chance(0.3) ? Millis(20) : kBusy;
    for (uint64_t n = 0; n < requests; ++n) At(arrivals, [this, n] { Request(n, DrawCancel()); });
    if (options_.faults) {
      for (uint64_t n = random.Below(4); n > 0; --n) At(kBusy, [this] { Crash(); });
    }
    bool ran = true;
    for (Duration now{}; now < kBusy; now += kLook) {
      ran = ran && world_.Run(TimePoint(now + kLook), kMaxEvents);
      for (const auto& prefill : prefills_) {
        if (prefill) prefill->Check();
      }
    }
    // Calm: what was sent is still under way, but nothing new goes wrong.
    network_.between = network_.inside = {};
    fabric_.script = {};
    ran = ran && world_.Run(TimePoint(kBusy + kCalm), kMaxEvents);
    CheckRest();
    // Twice: the first may meet what nobody has noticed yet (a rank that came back).
    second_.reset();
    uint64_t failed = 0;
    for (int round = 1; round <= 2; ++round) {
      failed = outcomes_.failed;
      for (uint64_t n = 0; n < prefills_.size(); ++n) Request(requests + n, kCalm);
      ran = ran && world_.Run(TimePoint(kBusy + kCalm + round * kAgain), kMaxEvents);
    }
    if (!ran) host_.Violate("the schedule does not come to an end");
    if (outcomes_.failed != failed) {
      host_.Violate("after the faults not every request is served: " + outcomes_.last_failure);
    }
    CheckRest();
    outcomes_.violation = host_.violation;
    return outcomes_;
  }

 private:
  void At(Duration within, std::function<void()> fn) {
    const auto when =
        static_cast<int64_t>(world_.random.Below(static_cast<uint64_t>(within.count())));
    world_.Schedule(TimePoint(Duration(when)), std::move(fn));
  }

  NetworkFaults DrawFaults() {
    Random& random = world_.random;
    return {.lose = random.Chance(0.5) ? 0.0 : 0.02,
            .repeat = random.Chance(0.5) ? 0.0 : 0.1,
            .slow = random.Chance(0.5) ? 0.0 : 0.05,
            .wrong_table = random.Chance(0.8) ? 0.0 : 0.05};
  }

  // From room for one request of the largest kind to room for several.
  uint32_t DrawBlocks() { return 8 + static_cast<uint32_t>(world_.random.Below(kBlocks - 7)); }

  void CheckRest() {
    for (size_t i = 0; i < prefills_.size(); ++i) {
      const auto& prefill = prefills_[i];
      prefill->Check();
      if (!prefill->AtRest()) host_.Violate("a prefill engine leaks: " + prefill->State());
      if (options_.faults) continue;
      // Readers say so as long as they want a lease, and when they want it no more. They do not
      // hear of a ticket that comes after they left, and claim no prefix that another one pulls.
      const bool heard = !options_.cancels && prefill_options_[i].ttl > kShortTtl;
      if (prefill->Ended("reader_silent") + prefill->Ended("cap") > 0 ||
          (heard && prefill->Ended("ttl") > 0)) {
        host_.Violate("a lease waited for its time to run out");
      }
    }
    for (const auto* decode : {decode_.get(), second_.get()}) {
      if (decode != nullptr && !decode->AtRest()) {
        host_.Violate("a decode engine leaks: " + decode->State());
      }
    }
    if (!options_.faults && decode_->Retries("kDeadlineExceeded") > 0) {
      host_.Violate("a request waited for its deadline");
    }
  }

  Duration DrawCancel() {
    Random& random = world_.random;
    if (!options_.cancels || !random.Chance(0.2)) return kCalm;
    return Millis(static_cast<int64_t>(random.Below(100)));
  }

  void Request(uint64_t n, Duration cancel_after) {
    Random& random = world_.random;
    Prompt prompt;
    if (random.Chance(0.6)) {
      prompt.prefix = 1 + random.Below(3);
      prompt.prefix_tokens = kBlockSize * static_cast<uint32_t>(prompt.prefix);
    }
    prompt.own = 100 + n;
    prompt.own_tokens = 1 + static_cast<uint32_t>(random.Below(7));
    decode_->Request(prompt, cancel_after, DrawHold());
  }

  // For one token, or many.
  Duration DrawHold() {
    Random& random = world_.random;
    return random.Chance(0.3) ? Duration{} : Millis(static_cast<int64_t>(random.Below(500)));
  }

  // The second engine loads what the first one asked for, or tries to with another request's lease
  // in the ticket; and it may try before the KV is complete.
  void OnTicket(const Prompt& prompt, const proto::Ticket& genuine) {
    Random& random = world_.random;
    proto::Ticket ticket = genuine;
    std::swap(last_lease_, ticket.prompt.lease);
    if (last_lease_.IsZero() || !random.Chance(0.2)) ticket = genuine;
    last_lease_ = genuine.prompt.lease;
    if (!second_ || !random.Chance(0.5)) return;
    const bool early = random.Chance(0.3);
    world_.Schedule(world_.Now() + Millis(static_cast<int64_t>(random.Below(20))),
                    [this, prompt, ticket, early] {
                      second_->Load(prompt, ticket, DrawHold());
                      if (early) second_->SetReady(ticket);
                    });
  }

  void Crash() {
    Random& random = world_.random;
    const Duration away = Millis(static_cast<int64_t>(random.Below(1500)));
    const uint64_t what = random.Below(5);
    const size_t i = random.Below(prefills_.size());
    auto& prefill = prefills_[i];
    if (what == 0) {
      decode_.reset();
      decode_ = std::make_unique<SimDecode>(host_, decode_options_, outcomes_);
    } else if (what == 1) {
      if (prefill) prefill->RestartRank1();
    } else if (what == 2) {  // the leader alone
      if (!prefill) return;
      auto rank1 = prefill->TakeRank1();
      prefill.reset();
      prefill = std::make_unique<SimPrefill>(host_, prefill_options_[i], std::move(rank1));
    } else {
      prefill.reset();
      world_.Schedule(world_.Now() + away, [this, i] {
        if (prefills_[i]) return;
        prefills_[i] = std::make_unique<SimPrefill>(host_, prefill_options_[i], nullptr);
      });
    }
  }

  const ScheduleOptions options_;
  World world_;
  Network network_;
  transport::FakeFabric fabric_;
  Host host_{
      .world = world_, .network = network_, .fabric = fabric_, .graveyard = {}, .violation = {}};
  Outcomes outcomes_;
  std::vector<SimPrefill::Options> prefill_options_;
  SimDecode::Options decode_options_;
  std::vector<std::unique_ptr<SimPrefill>> prefills_;
  std::unique_ptr<SimDecode> decode_;
  std::unique_ptr<SimDecode> second_;  // loads from tickets of the first
  LeaseId last_lease_;
};

}  // namespace

Outcomes RunSchedule(const ScheduleOptions& options) { return Cluster(options).Run(); }

}  // namespace kvrelay::sim
