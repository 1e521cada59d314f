// What the engine's tests share: the oracle's cases, engines on small models, and blocking
// generation.
#pragma once

#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "tests/common/temp_dir.h"

namespace kvrelay::engine {

// A model to test with, below the repository's root.
inline constexpr const char* kTinyModel = "tests/engine/data/tiny-gqa";

// A path below the repository's root.
std::string SourcePath(const std::string& relative);

// One greedy continuation by Hugging Face transformers.
struct OracleCase {
  std::string model;  // below the repository's root
  std::string name;
  std::vector<uint32_t> prompt;
  std::vector<uint32_t> expected;
};
// Those of `model`, or all when it is empty.
std::vector<OracleCase> OracleCases(const std::string& model = {});
std::vector<std::string> OracleModels();

// Options of a small engine on a folder below the repository's root; tests change what they are
// about.
EngineOptions SmallOptions(const std::string& model);
// Fails the test's process when the engine cannot be made.
std::unique_ptr<Engine> MakeEngine(const EngineOptions& options);

struct Answer {
  std::vector<uint32_t> token_ids;
  Outcome outcome;
};

// Submits `request` with callbacks of its own; the future is ready when on_done has run. A refusal
// is an outcome too.
std::future<Answer> Start(Engine& engine, Request request);
// Waits for at most a minute.
Answer Finish(std::future<Answer> answer);

Request GreedyRequest(std::vector<uint32_t> prompt, uint32_t max_new_tokens);

// A folder that is removed with its content.
class TempDir : public tests::TempDir {
 public:
  void Write(const std::string& file, const std::string& content) const;
};

// KVRELAY_SEED, or a random seed; printed, so that a failure can be run again.
uint64_t TestSeed();

}  // namespace kvrelay::engine
