#include "engine_testing.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/random.h"
#include "tests/common/slowness.h"

namespace kvrelay::engine {

std::string SourcePath(const std::string& relative) {
  const char* elsewhere = std::getenv("KVRELAY_SOURCE_DIR");  // on another machine
  const std::string root = elsewhere != nullptr ? elsewhere : KVRELAY_SOURCE_DIR;
  return (std::filesystem::path(root) / relative).string();
}

std::vector<OracleCase> OracleCases(const std::string& model) {
  std::ifstream file(SourcePath("tests/engine/data/hf_expected.json"));
  const nlohmann::json oracle = nlohmann::json::parse(file);
  std::vector<OracleCase> cases;
  for (const auto& entry : oracle["cases"]) {
    OracleCase one{entry["model"], entry["name"], entry["prompt"], entry["expected"]};
    if (model.empty() || one.model == model) cases.push_back(std::move(one));
  }
  return cases;
}

std::vector<std::string> OracleModels() {
  std::vector<std::string> models;
  for (const OracleCase& one : OracleCases()) {
    if (models.empty() || models.back() != one.model) models.push_back(one.model);
  }
  return models;
}

EngineOptions SmallOptions(const std::string& model) {
  EngineOptions options;
  options.model_dir = SourcePath(model);
  options.kv_blocks = 320;
  options.block_size = 16;
  options.threads = 2;
  return options;
}

std::unique_ptr<Engine> MakeEngine(const EngineOptions& options) {
  auto engine = Engine::Create(options);
  if (!engine) {
    std::cerr << "cannot make the engine: " << engine.error().ToString() << "\n";
    std::abort();
  }
  return std::move(engine).value();
}

std::future<Answer> Start(Engine& engine, Request request) {
  struct State {
    Answer answer;
    std::promise<Answer> promise;
  };
  auto state = std::make_shared<State>();
  std::future<Answer> future = state->promise.get_future();
  const auto on_tokens = std::move(request.on_tokens);
  request.on_tokens = [state, on_tokens](RequestNumber number, std::span<const uint32_t> ids) {
    state->answer.token_ids.insert(state->answer.token_ids.end(), ids.begin(), ids.end());
    if (on_tokens) on_tokens(number, ids);
  };
  request.on_done = [state](RequestNumber, const Outcome& outcome) {
    state->answer.outcome = outcome;
    state->promise.set_value(std::move(state->answer));
  };
  const Result<RequestNumber> number = engine.Submit(std::move(request));
  if (!number) {
    state->answer.outcome.status = number.error();
    state->promise.set_value(std::move(state->answer));
  }
  return future;
}

Answer Finish(std::future<Answer> answer) {
  const auto at_most = std::chrono::seconds(60) * tests::Slowness();
  if (answer.wait_for(at_most) != std::future_status::ready) {
    ADD_FAILURE() << "no answer within " << at_most.count() << " s";
    std::abort();
  }
  return answer.get();
}

Request GreedyRequest(std::vector<uint32_t> prompt, uint32_t max_new_tokens) {
  Request request;
  request.token_ids = std::move(prompt);
  request.max_new_tokens = max_new_tokens;
  request.ignore_eos = true;
  return request;
}

void TempDir::Write(const std::string& file, const std::string& content) const {
  std::ofstream(path() + "/" + file, std::ios::binary) << content;
}

uint64_t TestSeed() {
  const char* given = std::getenv("KVRELAY_SEED");
  const uint64_t seed = given != nullptr ? std::strtoull(given, nullptr, 10) : Random64();
  std::cout << "KVRELAY_SEED=" << seed << "\n";
  return seed;
}

}  // namespace kvrelay::engine
