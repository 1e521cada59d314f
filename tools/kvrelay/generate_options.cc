#include "tools/kvrelay/generate_options.h"

#include "base/random.h"
#include "proto/limits.h"
#include "tools/common/endpoint.h"
#include "tools/common/logging.h"

namespace kvrelay::tools {
namespace {

// Flags of AddEngineFlags: they configure the engine of --local and mean nothing for a daemon that
// runs already.
Status NoEngineFlags(const FlagSet& flags) {
  FlagSet of_engine("engine", "", "");
  EngineFlags ignored;
  AddEngineFlags(of_engine, &ignored);
  for (const EffectiveFlag& flag : of_engine.Effective()) {
    for (const EffectiveFlag& given : flags.Effective()) {
      if (given.name == flag.name && given.source == "flag") {
        return Error(
            Code::kInvalidArgument,
            "--" + flag.name + " goes with --local; the daemon behind --decode has its own");
      }
    }
  }
  return Status::Ok();
}

Status OnlyOneOf(const FlagSet& flags, const std::string& a, const std::string& b) {
  if (flags.Given(a) && flags.Given(b)) {
    return Error(Code::kInvalidArgument,
                 "--" + a + " and --" + b + " are both given: one says it all");
  }
  return Status::Ok();
}

}  // namespace

void GenerateOptions::Declare(FlagSet& flags) {
  request.max_new_tokens = 64;
  request.timeout_ms = 60'000;
  flags.Section("Where");
  flags.Text("decode", &decode, "ENDPOINT", "decode daemon, tcp://HOST:PORT[#KEY]");
  keys.Declare(flags);
  flags.Switch("local", &local, "in this process with --model=DIR, without any transfer");
  flags.Section("Prompt");
  flags.Text("prompt", &request.prompt_text, "TEXT", "prompt, for models with a text codec");
  flags.Ids("token_ids", &request.token_ids, "prompt as token ids");
  flags.Text("system", &request.system_text, "TEXT",
             "system prompt: stands before the prompt and is shared");
  flags.Ids("system_token_ids", &request.system_ids, "system prompt as token ids");
  flags.Section("Generation");
  flags.Whole("max_new_tokens", &request.max_new_tokens, 1, proto::kMaxTokens, "tokens at most");
  flags.Real("temperature", &request.temperature, 0, 100, "0 takes the most likely token");
  flags.Real("top_p", &request.top_p, 1e-6, 1, "least probability mass to sample from");
  flags.Whole("seed", &request.seed, 0, UINT64_MAX, "of the sampling");
  flags.Switch("ignore_eos", &request.ignore_eos, "goes on behind the model's end token");
  flags.Ids("stop_token_ids", &request.stop_ids, "tokens that end the text");
  flags.Section("Request");
  flags.Switch("json", &json, "one object with ids, text, timing and bytes moved, at the end");
  flags.Whole("timeout_ms", &request.timeout_ms, 1, proto::kMaxDurationMs,
              "deadline of the whole request, in milliseconds");
  flags.Custom(
      "priority", "decode|prefetch", std::string(PriorityName(request.priority)),
      [this](std::string_view text) -> Status {
        KVRELAY_ASSIGN_OR_RETURN(request.priority, PriorityFromName(text));
        return Status::Ok();
      },
      "whether somebody waits for the answer: prefetch lets other requests' caches come first");
  flags.Text("request_id", &request.request_id, "ID",
             "name of the request in all logs; made when empty");
  AddLogFlag(flags, &log_level);
  AddEngineFlags(flags, &engine, " (with --local)");
}

Status GenerateOptions::Check(const FlagSet& flags) {
  if (local == !decode.empty()) {
    return Error(Code::kInvalidArgument,
                 local ? "--local and --decode are both given"
                       : "--decode=ENDPOINT or --model=DIR --local is needed");
  }
  if (local) {
    if (engine.options.model_dir.empty()) {
      return Error(Code::kInvalidArgument, "--local needs --model=DIR");
    }
    KVRELAY_RETURN_IF_ERROR(engine.options.Validate());
  } else {
    KVRELAY_RETURN_IF_ERROR(NoEngineFlags(flags));
    const Result<Endpoint> endpoint = ParseEndpoint(decode, AnyPort::kForbidden);
    if (!endpoint) return endpoint.error().Wrap("--decode");
    decode = endpoint->ToString();
  }
  KVRELAY_RETURN_IF_ERROR(OnlyOneOf(flags, "prompt", "token_ids"));
  KVRELAY_RETURN_IF_ERROR(OnlyOneOf(flags, "system", "system_token_ids"));
  const bool has_text = !request.prompt_text.empty() || !request.system_text.empty();
  const bool has_ids = !request.token_ids.empty() || !request.system_ids.empty();
  if (has_text && has_ids) {
    return Error(Code::kInvalidArgument,
                 "system prompt and prompt must both be text or both be token ids");
  }
  if (request.prompt_text.empty() && request.token_ids.empty()) {
    return Error(Code::kInvalidArgument, "--prompt=TEXT or --token_ids=1,2,3 is needed");
  }
  if (request.stop_ids.size() > proto::kMaxStopIds) {
    return Error(Code::kInvalidArgument, "--stop_token_ids has " +
                                             std::to_string(request.stop_ids.size()) +
                                             " ids; at most " + std::to_string(proto::kMaxStopIds));
  }
  if (request.request_id.size() > proto::kMaxName) {
    return Error(Code::kInvalidArgument,
                 "--request_id is longer than " + std::to_string(proto::kMaxName) + " bytes");
  }
  if (request.request_id.empty())
    request.request_id = RandomId<Id128<struct RequestIdTag>>().ToHex();
  return Status::Ok();
}

}  // namespace kvrelay::tools
