// What tests of the scheduler share.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "engine/scheduler.h"
#include "engine_testing.h"

namespace kvrelay::engine {

// A scheduler on a tiny model, stepped by hand, on a clock turned by hand.
class SchedulerTest : public testing::Test {
 protected:
  static constexpr uint32_t kBlock = 4;

  void Open(uint32_t blocks, SchedulerOptions options = {}, uint32_t max_prefixes = 100,
            uint32_t tp = 1) {
    Close();
    EngineOptions engine = SmallOptions(kTinyModel);
    engine.block_size = kBlock;
    engine.kv_blocks = blocks;
    engine.tp = tp;
    const auto config = LoadModelConfig(engine.model_dir);
    runner_ = std::move(*ModelRunner::Create(*config, *Checkpoint::Open(engine.model_dir), engine));
    prefixes_ = std::make_unique<SystemPrefixStore>(max_prefixes);
    conversations_ = std::make_unique<ConversationStore>(
        ConversationStore::Limits{.max_blocks = max_kept_blocks_, .ttl = Millis(1000)});
    options.now = [this] { return now_; };
    options.model = ContentHash{{1}};
    scheduler_ = std::make_unique<Scheduler>(*runner_, *prefixes_, *conversations_, options);
  }

  void TearDown() override { Close(); }
  void Close() {
    scheduler_ = nullptr;
    conversations_ = nullptr;
    admissions_.clear();
    if (prefixes_) prefixes_->Clear();
    if (runner_) {
      EXPECT_EQ(runner_->pool()->used_blocks(), 0U) << "blocks leaked";
    }
  }

  RequestNumber Add(Request request) {
    const RequestNumber number = ++last_number_;
    request.on_tokens = [this](RequestNumber n, std::span<const uint32_t> ids) {
      EXPECT_FALSE(outcomes_.contains(n)) << "a token after the end";
      ids_[n].insert(ids_[n].end(), ids.begin(), ids.end());
      if (on_token_) on_token_(n);
    };
    request.on_done = [this](RequestNumber n, const Outcome& outcome) {
      EXPECT_TRUE(outcomes_.emplace(n, outcome).second) << "on_done twice";
    };
    request.on_admitted = [this](RequestNumber n, Admission admission) {
      admissions_[n] = std::move(admission);
    };
    scheduler_->Add(number, std::move(request));
    return number;
  }

  static Request Make(std::vector<uint32_t> system, std::vector<uint32_t> ids, uint32_t max_new) {
    Request request = GreedyRequest(std::move(ids), max_new);
    request.system_ids = std::move(system);
    return request;
  }

  static std::vector<uint32_t> Ids(uint32_t count, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<uint32_t> ids(count);
    for (uint32_t& id : ids) id = random() % 96;
    return ids;
  }

  void RunAll() {
    for (int step = 0; step < 10'000; ++step) {
      if (!scheduler_->Step()) return;
    }
    FAIL() << "no end of steps";
  }

  uint32_t free() const { return runner_->pool()->free_blocks(); }

  TimePoint now_{Millis(1000)};
  uint32_t max_kept_blocks_ = 0;
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<SystemPrefixStore> prefixes_;
  std::unique_ptr<ConversationStore> conversations_;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<RequestNumber, std::vector<uint32_t>> ids_;
  std::map<RequestNumber, Outcome> outcomes_;
  std::map<RequestNumber, Admission> admissions_;
  std::function<void(RequestNumber)> on_token_;
  RequestNumber last_number_ = 0;
};

}  // namespace kvrelay::engine
