#include "tools/kvrelay/local_engine.h"

#include <chrono>
#include <future>

#include "engine/summary.h"

namespace kvrelay::tools {
namespace {

using std::chrono::steady_clock;

Result<engine::PromptIds> Prompt(const proto::Generate& request,
                                 const engine::Tokenizer& tokenizer) {
  if (!request.prompt_text.empty() || !request.system_text.empty()) {
    return tokenizer.Encode(request.system_text, request.prompt_text);
  }
  return engine::PromptIds{.system_ids = request.system_ids, .token_ids = request.token_ids};
}

}  // namespace

Result<LocalEngine> LocalEngine::Open(const EngineFlags& flags) {
  KVRELAY_ASSIGN_OR_RETURN(std::shared_ptr<const engine::Platform> platform, OpenPlatform(flags));
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<engine::Engine> engine,
                           engine::Engine::Create(flags.options, std::move(platform)));
  return LocalEngine(std::move(engine));
}

Result<Answer> LocalEngine::Generate(const proto::Generate& request, const StopSignals& signals,
                                     const OnTokens& on_tokens) {
  KVRELAY_ASSIGN_OR_RETURN(engine::PromptIds prompt, Prompt(request, engine_->tokenizer()));
  Answer answer;
  engine::TextStream text(engine_->tokenizer());
  std::promise<engine::Outcome> done;

  engine::Request to_engine;
  to_engine.system_ids = std::move(prompt.system_ids);
  to_engine.token_ids = std::move(prompt.token_ids);
  to_engine.max_new_tokens = request.max_new_tokens;
  to_engine.sampling = {
      .temperature = request.temperature, .top_p = request.top_p, .seed = request.seed};
  to_engine.stop_ids = request.stop_ids;
  to_engine.ignore_eos = request.ignore_eos;
  to_engine.deadline = steady_clock::now() + std::chrono::milliseconds(request.timeout_ms);
  to_engine.on_tokens = [&](engine::RequestNumber, std::span<const uint32_t> ids) {
    answer.token_ids.insert(answer.token_ids.end(), ids.begin(), ids.end());
    const std::string more = text.Add(ids);
    answer.text += more;
    on_tokens({ids.begin(), ids.end()}, more);
  };
  to_engine.on_done = [&](engine::RequestNumber, const engine::Outcome& outcome) {
    const std::string rest = text.Finish();
    answer.text += rest;
    if (!rest.empty()) on_tokens({}, rest);
    done.set_value(outcome);
  };
  KVRELAY_ASSIGN_OR_RETURN(const engine::RequestNumber number,
                           engine_->Submit(std::move(to_engine)));
  const WhenStopped cancel(signals, [this, number] { engine_->Cancel(number); });
  // Bounded by the request's deadline, which the engine keeps.
  const engine::Outcome outcome = done.get_future().get();
  KVRELAY_RETURN_IF_ERROR(outcome.status);
  answer.summary_json =
      engine::SummaryJson(request.request_id, outcome, engine::LocalTransfer(outcome));
  return answer;
}

}  // namespace kvrelay::tools
