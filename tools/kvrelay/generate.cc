// kvrelay generate: one prompt, answered by a decode daemon or in this process.
#include <nlohmann/json.hpp>

#include "tools/common/exit_code.h"
#include "tools/common/logging.h"
#include "tools/common/output.h"
#include "tools/common/start.h"
#include "tools/common/units.h"
#include "tools/kvrelay/answer.h"
#include "tools/kvrelay/command.h"
#include "tools/kvrelay/generate_options.h"
#include "tools/kvrelay/local_engine.h"

namespace kvrelay::tools {
namespace {

// What stays on the screen of a model without text: its ids.
std::string IdsLine(const std::vector<uint32_t>& token_ids) {
  std::string line;
  for (const uint32_t id : token_ids) line += (line.empty() ? "" : " ") + std::to_string(id);
  return line;
}

// One line for somebody at a terminal, on stderr.
std::string SummaryLine(const Answer& answer) {
  const auto summary = nlohmann::json::parse(answer.summary_json, nullptr, false);
  if (!summary.is_object()) return "";
  const auto timing = summary.value("timing_ms", nlohmann::json::object());
  const auto kv = summary.value("kv", nlohmann::json::object());
  const uint64_t reused = kv.value("reused_tokens", uint64_t{0});
  std::string reuse;
  if (reused > 0) {
    reuse = "; reused " + std::to_string(reused) + " tokens of earlier turns (" +
            FormatBytes(kv.value("reuse_bytes", uint64_t{0})) + " in " +
            FormatMillis(timing.value("reuse", 0.0)) + "), computed " +
            std::to_string(kv.value("computed_tokens", uint64_t{0})) + " in " +
            FormatMillis(timing.value("prefill", 0.0)) + ", saved " +
            FormatMillis(timing.value("saved", 0.0));
  }
  return "[" + std::to_string(answer.token_ids.size()) + " tokens, first after " +
         FormatMillis(timing.value("ttft", 0.0)) + ", all after " +
         FormatMillis(timing.value("total", 0.0)) + "; KV path " + kv.value("path", "?") + ", " +
         FormatBytes(kv.value("bytes_pulled", uint64_t{0})) + " pulled" + reuse + "]";
}

int Fail(const FlagSet& flags, const GenerateOptions& options, const Status& status,
         int exit_code) {
  if (!options.json && StdoutIsTerminal()) WriteOut("\n");
  ReportFailure(flags.program(), status, options.decode, options.json);
  return exit_code;
}

}  // namespace

int GenerateCommand(CommandArgs args) {
  GenerateOptions options;
  FlagSet flags(
      "kvrelay generate --decode=ENDPOINT (--prompt=TEXT | --token_ids=1,2,3) [flags]\n"
      "       kvrelay generate --local --model=DIR (--prompt=TEXT | --token_ids=1,2,3) [flags]",
      "Generates the continuation of a prompt. The prompt is the system prompt, if any, followed "
      "by the\n"
      "prompt. Text streams to stdout as it comes; ^C cancels the request where it runs.",
      "kvrelay generate --decode=tcp://127.0.0.1:7602 --prompt='Now is the winter'");
  options.Declare(flags);
  if (const auto done = ParseOrFinish(flags, args)) return *done;
  if (const Status status = options.Check(flags); !status.ok()) {
    return FailUsage(flags, status, options.json);
  }
  StartLogging("kvrelay", options.log_level);

  const Result<StopSignals> signals = StopSignals::Install(kExitCancelled);
  if (!signals) {
    ReportFailure(flags.program(), signals.error(), "", options.json);
    return kExitFailed;
  }
  const OnTokens on_tokens = [json = options.json](const auto& /*ids*/, std::string_view text) {
    if (!json) WriteOut(text);
  };
  Result<Answer> answer = Error(Code::kInternal, "not asked");
  if (options.local) {
    Result<LocalEngine> engine = LocalEngine::Open(options.engine);
    if (!engine)
      return Fail(flags, options, engine.error(), SetupExitCodeOf(engine.error().code()));
    answer = engine->Generate(options.request, *signals, on_tokens);
  } else {
    answer = GenerateRemotely(options.decode, options.keys, options.request, *signals, on_tokens);
  }
  if (!answer) {
    const Code code = answer.error().code();
    const bool cancelled_there = code == Code::kCancelled && !signals->stopped();
    return Fail(flags, options, answer.error(), cancelled_there ? kExitFailed : ExitCodeOf(code));
  }
  if (options.json) {
    WriteOut(AnswerJson(*answer) + "\n");
  } else {
    const bool has_text = !answer->text.empty() || !options.request.prompt_text.empty();
    WriteOut(has_text ? "\n" : IdsLine(answer->token_ids) + "\n");
    if (StderrIsTerminal()) WriteErrorLine(SummaryLine(*answer));
  }
  return kExitOk;
}

}  // namespace kvrelay::tools
