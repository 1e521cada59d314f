// kvrelay demo: a system prompt and a few prompts through a prefill and a decode daemon, and the
// proof that one process would have said the same.
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "base/random.h"
#include "tools/common/exit_code.h"
#include "tools/common/logging.h"
#include "tools/common/output.h"
#include "tools/common/panels.h"
#include "tools/common/start.h"
#include "tools/kvrelay/command.h"
#include "tools/kvrelay/demo_daemons.h"
#include "tools/kvrelay/demo_show.h"
#include "tools/kvrelay/local_engine.h"

namespace kvrelay::tools {
namespace {

constexpr const char* kSystem =
    "THE TRAGEDY OF THE RELAY\n\n"
    "DRAMATIS PERSONAE\n\n"
    "HAMLET, a prince\nLEAR, an old king\nROMEO, a lover\nPORTIA, a lady\n\n"
    "ACT I. SCENE I. A heath. Storm and lightning. Enter the King and his lords, and all who wait "
    "upon them.\n\n"
    "LEAR.\nBlow, winds, and crack your cheeks! Rage, blow!\nYou cataracts and hurricanoes, spout\n"
    "Till you have drench'd our steeples, drown'd the cocks!\n\n";
constexpr std::array<const char*, 4> kPrompts = {"HAMLET.\nTo be, or not", "ROMEO.\nBut soft,",
                                                 "PORTIA.\nThe quality of", "LEAR.\nO, reason not"};
constexpr double kTemperature = 0.6;
constexpr uint32_t kTimeoutMs = 60'000;
constexpr size_t kEveryLine = 1000;
constexpr Duration kRedraw = std::chrono::milliseconds(50);

struct DemoOptions {
  std::string model;
  std::string transport = "auto";
  std::string device = "cpu";
  std::string kv_cache = "paged";
  uint32_t prefill_tp = 2;
  uint32_t decode_tp = 1;
  uint32_t max_new_tokens = 160;
  bool json = false;
  std::string log_level = "error";
};

std::vector<DemoRequest> Requests(const DemoOptions& options) {
  std::vector<DemoRequest> requests;
  for (const char* prompt : kPrompts) {
    proto::Generate request;
    request.request_id = "demo-" + std::to_string(requests.size() + 1);
    request.system_text = kSystem;
    request.prompt_text = prompt;
    request.max_new_tokens = options.max_new_tokens;
    request.temperature = kTemperature;
    request.seed = requests.size() + 1;
    request.ignore_eos = true;
    request.timeout_ms = kTimeoutMs;
    requests.push_back({.request = std::move(request), .answer = {}, .local = {}});
  }
  return requests;
}

using Ask = std::function<Result<Answer>(const proto::Generate&, const OnTokens&)>;

// The texts while they grow: in place on a terminal, once at the end elsewhere.
class Stage {
 public:
  Stage(const std::vector<DemoRequest>& requests, const Paint& paint) : paint_(paint) {
    for (size_t i = 0; i < requests.size(); ++i) {
      panels_.push_back(
          {.title = "[" + std::to_string(i + 1) + "]", .text = requests[i].request.prompt_text});
    }
  }
  // Any thread.
  void Add(size_t request, std::string_view text) {
    const std::lock_guard lock(mutex_);
    panels_[request].text += text;
  }
  void Draw() {
    std::vector<Panel> panels;
    {
      const std::lock_guard lock(mutex_);
      panels = panels_;
    }
    const bool terminal = StdoutIsTerminal();
    const ScreenSize screen = TerminalSize();
    std::vector<std::string> lines =
        LayOutPanels(panels, screen.columns - 4, terminal ? screen.rows - 2 : kEveryLine);
    for (std::string& line : lines) line.insert(0, line.empty() ? "" : "    ");
    lines.insert(lines.begin(), paint_.Bold("Four users, at the same time"));
    if (terminal) return live_.Show(lines);
    for (const std::string& line : lines) WriteOut(line + "\n");
  }

 private:
  const Paint& paint_;
  std::mutex mutex_;
  std::vector<Panel> panels_;
  LiveLines live_;
};

// All requests at once, each on a thread; the first failure.
Status AskAll(std::vector<DemoRequest>& requests, const Ask& ask, Answer DemoRequest::*answer,
              Stage* stage, bool live) {
  std::vector<Status> outcomes(requests.size());
  std::atomic<size_t> open = requests.size();
  std::vector<std::thread> threads;
  for (size_t i = 0; i < requests.size(); ++i) {
    threads.emplace_back([&, i] {
      const auto on_tokens = [stage, i](const auto& /*ids*/, std::string_view text) {
        if (stage != nullptr) stage->Add(i, text);
      };
      Result<Answer> got = ask(requests[i].request, on_tokens);
      if (got) {
        requests[i].*answer = std::move(got).value();
      } else {
        outcomes[i] = got.error();
      }
      --open;
    });
  }
  // Every request has its deadline.
  while (live && open > 0) {
    stage->Draw();
    std::this_thread::sleep_for(kRedraw);
  }
  for (std::thread& thread : threads) thread.join();
  if (stage != nullptr) stage->Draw();
  for (size_t i = 0; i < outcomes.size(); ++i) {
    if (!outcomes[i].ok()) return outcomes[i].Wrap("request " + std::to_string(i + 1));
  }
  return Status::Ok();
}

// The whole play; true when all token ids were the same.
Result<bool> Play(DemoOptions options, const StopSignals& signals) {
  const Paint paint(StdoutIsTerminal() && std::getenv("NO_COLOR") == nullptr);
  const auto say = [&options](const std::string& text) {
    if (!options.json) WriteOut(text);
  };
  if (options.model.empty()) {
    KVRELAY_ASSIGN_OR_RETURN(options.model, FindBundledModel());
  }
  KVRELAY_ASSIGN_OR_RETURN(const DemoDaemons daemons,
                           DemoDaemons::Start({.model = options.model,
                                               .transport = options.transport,
                                               .device = options.device,
                                               .kv_cache = options.kv_cache,
                                               .prefill_tp = options.prefill_tp,
                                               .decode_tp = options.decode_tp},
                                              signals));
  std::vector<DemoRequest> requests = Requests(options);
  say(DemoBanner(daemons, options.model, paint));
  say(DemoPrompts(requests, paint));

  Stage stage(requests, paint);
  const Ask ask_daemons = [&](const proto::Generate& request, const OnTokens& on_tokens) {
    return GenerateRemotely(daemons.decode().endpoint, {}, request, signals, on_tokens);
  };
  KVRELAY_RETURN_IF_ERROR(AskAll(requests, ask_daemons, &DemoRequest::answer,
                                 options.json ? nullptr : &stage,
                                 !options.json && StdoutIsTerminal()));
  say(DemoTable(requests, paint));

  EngineFlags local_engine;
  local_engine.options.model_dir = options.model;
  KVRELAY_ASSIGN_OR_RETURN(LocalEngine local, LocalEngine::Open(local_engine));
  const Ask ask_local = [&](const proto::Generate& request, const OnTokens& on_tokens) {
    return local.Generate(request, signals, on_tokens);
  };
  KVRELAY_RETURN_IF_ERROR(AskAll(requests, ask_local, &DemoRequest::local, nullptr, false));
  say(DemoVerdict(requests, paint));
  if (options.json) WriteOut(DemoJson(daemons, options.model, requests) + "\n");
  return AllIdentical(requests);
}

}  // namespace

int DemoCommand(CommandArgs args) {
  DemoOptions options;
  FlagSet flags("kvrelay demo [flags]",
                "Starts a prefill and a decode daemon on this machine, sends them a system prompt "
                "with four prompts,\n"
                "shows the texts and what was pulled between the daemons, and runs the same "
                "prompts in one process:\n"
                "the token ids must be the same (exit status 1 if not). Leaves nothing behind.",
                "kvrelay demo");
  flags.Text("model", &options.model, "DIR",
             "model folder with a byte-level tokenizer; the bundled one when empty");
  flags.Choice("transport", &options.transport, {"auto", "mapped", "ucx-packed"},
               "how the cache is pulled");
  flags.Choice("device", &options.device, {"cpu", "cuda"},
               "where the daemons compute, in fp32; the one process that they are compared with: "
               "on the host");
  flags.Choice("kv_cache", &options.kv_cache, {"paged", "virtual"},
               "how the daemons keep it; the one process that they are compared with: paged");
  flags.Whole("prefill_tp", &options.prefill_tp, 1, 64, "ranks of the prefill daemon");
  flags.Whole("decode_tp", &options.decode_tp, 1, 64, "ranks of the decode daemon");
  flags.Whole("max_new_tokens", &options.max_new_tokens, 1, 4096, "tokens of each answer");
  flags.Switch("json", &options.json, "one object with everything at the end");
  AddLogFlag(flags, &options.log_level);
  if (const auto done = ParseOrFinish(flags, args)) return *done;
  StartLogging("kvrelay", options.log_level);

  const Result<StopSignals> signals = StopSignals::Install(kExitCancelled);
  if (!signals) {
    ReportFailure(flags.program(), signals.error(), "", options.json);
    return kExitFailed;
  }
  const Result<bool> identical = Play(options, *signals);
  if (!identical) {
    ReportFailure(flags.program(), identical.error(), "", options.json);
    return signals->stopped() ? kExitCancelled : ExitCodeOf(identical.error().code());
  }
  return *identical ? kExitOk : kExitFailed;
}

}  // namespace kvrelay::tools
