// kvrelay backends: which attention a model gets on this machine, and why not another.
#include <nlohmann/json.hpp>

#include "attention/backend.h"
#include "engine/model_config.h"
#include "tools/common/engine_flags.h"
#include "tools/common/exit_code.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/kvrelay/command.h"

namespace kvrelay::tools {
namespace {

using attention::Backend;
using attention::BackendChoice;
using attention::BackendTraits;

// Why `backend` was not chosen; empty for the one that was.
std::string WhyNot(const BackendChoice& choice, Backend backend) {
  for (const auto& [rejected, why] : choice.rejected) {
    if (rejected == backend) return why;
  }
  return backend == choice.backend ? ""
                                   : std::string(BackendName(choice.backend)) + " was preferred";
}

std::string DTypes(const BackendTraits& traits) {
  std::string text;
  for (const DType dtype : traits.cache_dtypes) {
    text += (text.empty() ? "" : ", ") + std::string(DTypeName(dtype));
  }
  return text;
}

std::string ChoiceText(const BackendChoice& choice) {
  std::string text;
  for (const Backend backend : attention::kBackends) {
    const BackendTraits& traits = TraitsOf(backend);
    const std::string why_not = WhyNot(choice, backend);
    text += std::string(traits.name) +
            (why_not.empty() ? ": chosen, " + choice.why : ": " + why_not) + "\n    serves " +
            traits.kinds.ToString() + "; caches of " + DTypes(traits) + "\n";
  }
  return text;
}

std::string ChoiceJson(const BackendChoice& choice) {
  nlohmann::ordered_json json = {{"schema", 1},
                                 {"backend", BackendName(choice.backend)},
                                 {"why", choice.why},
                                 {"backends", nlohmann::ordered_json::array()}};
  for (const Backend backend : attention::kBackends) {
    const BackendTraits& traits = TraitsOf(backend);
    nlohmann::ordered_json one = {{"name", traits.name},
                                  {"chosen", backend == choice.backend},
                                  {"why_not", WhyNot(choice, backend)},
                                  {"window", traits.kinds.window},
                                  {"soft_cap", traits.kinds.soft_cap},
                                  {"alibi", traits.kinds.alibi},
                                  {"mla", traits.kinds.mla},
                                  {"cache_dtypes", nlohmann::ordered_json::array()}};
    for (const DType dtype : traits.cache_dtypes) one["cache_dtypes"].push_back(DTypeName(dtype));
    json["backends"].push_back(std::move(one));
  }
  return json.dump() + "\n";
}

}  // namespace

int BackendsCommand(CommandArgs args) {
  EngineFlags engine;
  bool json = false;
  FlagSet flags(
      "kvrelay backends --model=DIR [flags]",
      "Shows which attention backend an engine with these flags would run the model with, "
      "why\nthe others were not chosen, and what each of them serves.",
      "kvrelay backends --model=models/bard-4m --kv_dtype=bf16");
  flags.Switch("json", &json, "one object on stdout");
  AddEngineFlags(flags, &engine);
  if (const auto done = ParseOrFinish(flags, args)) return *done;

  if (const Status status = engine.options.Validate(); !status.ok()) {
    return FailUsage(flags, status, json);
  }
  const auto choose = [&]() -> Result<BackendChoice> {
    KVRELAY_ASSIGN_OR_RETURN(const engine::ModelConfig config,
                             engine::LoadModelConfig(engine.options.model_dir));
    KVRELAY_ASSIGN_OR_RETURN(const std::shared_ptr<const engine::Platform> platform,
                             OpenPlatform(engine));
    return platform->ChooseAttnBackend(config, engine.options);
  };
  const Result<BackendChoice> choice = choose();
  if (!choice) {
    ReportFailure(flags.program(), choice.error(), "", json);
    return SetupExitCodeOf(choice.error().code());
  }
  WriteOut(json ? ChoiceJson(*choice) : ChoiceText(*choice));
  return kExitOk;
}

}  // namespace kvrelay::tools
