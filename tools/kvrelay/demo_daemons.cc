#include "tools/kvrelay/demo_daemons.h"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tools/common/exit_code.h"

namespace kvrelay::tools {
namespace {

namespace fs = std::filesystem;
using std::chrono::steady_clock;

constexpr Duration kReadyDeadline = std::chrono::seconds(60);
constexpr Duration kStopDeadline = std::chrono::seconds(5);
constexpr Duration kLook = std::chrono::milliseconds(50);

Result<std::string> MakeFolder() {
  std::string folder = (fs::temp_directory_path() / "kvrelay-demo-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) {
    return Error(Code::kResourceExhausted, "cannot make a folder like " + folder);
  }
  return folder;
}

// The ready line; looks at `signals` meanwhile.
Result<std::string> ReadyLine(ChildProcess& process, const StopSignals& signals) {
  const TimePoint until = steady_clock::now() + kReadyDeadline;
  for (;;) {
    Result<std::string> line = process.ReadLine(kLook);
    if (line || line.error().code() != Code::kDeadlineExceeded) return line;
    if (signals.stopped()) return Error(Code::kCancelled, "interrupted");
    if (steady_clock::now() >= until) return line;
  }
}

}  // namespace

Result<std::string> FindBundledModel() {
  KVRELAY_ASSIGN_OR_RETURN(const std::string own_folder, OwnFolder());
  std::string looked_in;
  // build/<preset>/bin, and <prefix>/bin of an installation.
  for (const char* relative : {"../../../models", "../share/kvrelay/models"}) {
    const fs::path models = fs::path(own_folder) / relative;
    std::error_code ignored;
    for (const auto& entry : fs::directory_iterator(models, ignored)) {
      if (fs::exists(entry.path() / "config.json", ignored)) {
        return fs::canonical(entry.path(), ignored).string();
      }
    }
    looked_in += (looked_in.empty() ? "" : " and ") + models.lexically_normal().string();
  }
  return Error(Code::kNotFound, "no model in " + looked_in + ": name one with --model=DIR");
}

std::string DemoDaemons::LastWords(const std::string& name) const {
  constexpr size_t kLines = 5;
  std::ifstream log(folder_ + "/" + name + ".log");
  std::vector<std::string> lines;
  for (std::string line; std::getline(log, line);) lines.push_back(line);
  std::string words;
  for (size_t i = lines.size() > kLines ? lines.size() - kLines : 0; i < lines.size(); ++i) {
    words += "\n  " + lines[i];
  }
  return words;
}

Result<DemoDaemon> DemoDaemons::StartOne(const std::string& name, uint32_t tp,
                                         std::vector<std::string> flags,
                                         const StopSignals& signals) {
  KVRELAY_ASSIGN_OR_RETURN(const std::string own_folder, OwnFolder());
  ChildOptions options = {
      .argv = {own_folder + "/kvrelayd", "--role=" + name, "--tp=" + std::to_string(tp),
               "--listen=tcp://127.0.0.1:0", "--run_dir=" + folder_ + "/run"},
      .stderr_path = folder_ + "/" + name + ".log"};
  options.argv.insert(options.argv.end(), flags.begin(), flags.end());
  KVRELAY_ASSIGN_OR_RETURN(ChildProcess process, ChildProcess::Start(options));
  const Result<std::string> line = ReadyLine(process, signals);
  if (!line) {
    if (line.error().code() == Code::kCancelled) return Error(line.error());
    const Result<ExitStatus> ended = process.Wait(std::chrono::seconds(1));
    const bool bad_setup = ended && *ended == ExitStatus{.code = kExitUsage, .signal = 0};
    return Error(bad_setup ? Code::kInvalidArgument : Code::kInternal,
                 "the " + name + " daemon did not become ready (" +
                     (ended ? ended->ToString() : line.error().message()) + ")" + LastWords(name));
  }
  DemoDaemon daemon = {.name = name,
                       .endpoint = "",
                       .tp = tp,
                       .pid = process.pid(),
                       .ready = nlohmann::ordered_json::parse(*line, nullptr, false)};
  if (daemon.ready.is_object()) daemon.endpoint = daemon.ready.value("endpoint", "");
  if (daemon.endpoint.empty()) {
    return Error(Code::kInternal,
                 "the " + name + " daemon's first line is no ready line: " + *line);
  }
  processes_.push_back(std::move(process));
  return daemon;
}

Result<DemoDaemons> DemoDaemons::Start(const Options& options, const StopSignals& signals) {
  DemoDaemons daemons;
  KVRELAY_ASSIGN_OR_RETURN(daemons.folder_, MakeFolder());
  const std::vector<std::string> common = {
      "--model=" + options.model, "--transport=" + options.transport, "--device=" + options.device,
      "--dtype=fp32", "--kv_cache=" + options.kv_cache};
  KVRELAY_ASSIGN_OR_RETURN(daemons.prefill_,
                           daemons.StartOne("prefill", options.prefill_tp, common, signals));
  std::vector<std::string> of_decode = common;
  of_decode.push_back("--prefill=" + daemons.prefill_.endpoint);
  KVRELAY_ASSIGN_OR_RETURN(daemons.decode_, daemons.StartOne("decode", options.decode_tp,
                                                             std::move(of_decode), signals));
  return daemons;
}

DemoDaemons::~DemoDaemons() {
  for (const ChildProcess& process : processes_) process.Signal(SIGTERM);
  const TimePoint until = steady_clock::now() + kStopDeadline;
  for (ChildProcess& process : processes_) {
    [[maybe_unused]] const auto ended = process.Wait(until - steady_clock::now());
  }
  processes_.clear();
  std::error_code ignored;
  if (!folder_.empty()) fs::remove_all(folder_, ignored);
}

}  // namespace kvrelay::tools
