#include "tests/integration/harness.h"

#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>
#include <thread>

namespace kvrelay::integration {
namespace {

namespace fs = std::filesystem;
using std::chrono::steady_clock;
using tools::ChildOptions;
using tools::ChildProcess;
using tools::ExitStatus;

constexpr Duration kReadyDeadline = std::chrono::seconds(60);
constexpr size_t kLogTail = 4000;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string Tail(const std::string& text) {
  return text.size() <= kLogTail ? text : "[...]" + text.substr(text.size() - kLogTail);
}

Args CommandLine(Args launcher, const std::string& program, const Args& args) {
  launcher.push_back(std::string(KVRELAY_BIN_DIR) + "/" + program);
  launcher.insert(launcher.end(), args.begin(), args.end());
  return launcher;
}

bool HasFlag(const Args& args, const std::string& name) {
  return std::any_of(args.begin(), args.end(), [&name](const std::string& arg) {
    return arg == "--" + name || arg.starts_with("--" + name + "=");
  });
}

void AddUnlessGiven(Args& args, const std::string& name, const std::string& value) {
  if (!HasFlag(args, name)) args.push_back("--" + name + "=" + value);
}

std::string NewFolder() {
  std::string name = (fs::temp_directory_path() / "kvrelay-test-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) {
    ADD_FAILURE() << "cannot make a folder " << name;
    return "";
  }
  return name;
}

double MillisSince(TimePoint start) { return ToMillis(steady_clock::now() - start); }

}  // namespace

Daemon::Daemon(std::string name, const Args& args, const std::string& folder, const Args& launcher)
    : name_(std::move(name)), log_path_(folder + "/" + name_ + ".log") {
  const ChildOptions options = {.argv = CommandLine(launcher, "kvrelayd", args),
                                .stderr_path = log_path_};
  Result<ChildProcess> process = ChildProcess::Start(options);
  if (!process) {
    ADD_FAILURE() << process.error().ToString();
    return;
  }
  process_ = std::move(process).value();
  const Result<std::string> line = process_->ReadLine(kReadyDeadline * Slowness());
  if (line) ready_ = Json::parse(*line, nullptr, false);
  if (!line || ready_.is_discarded() || !ready_.is_object()) {
    ready_ = nullptr;
    ADD_FAILURE() << name_ << " did not become ready: "
                  << (line ? "it wrote " + *line : line.error().ToString()) << "\n"
                  << Tail(log());
    process_->Kill();
  }
}

std::string Daemon::log() const { return ReadFile(log_path_); }

void Daemon::Kill() {
  if (process_) process_->Kill();
}
void Daemon::Freeze() {
  if (!process_) return;
  process_->Signal(SIGSTOP);
  siginfo_t stopped;  // or ended; left for the process's own Wait
  waitid(P_PID, static_cast<id_t>(process_->pid()), &stopped, WSTOPPED | WEXITED | WNOWAIT);
}
void Daemon::Thaw() {
  if (process_) process_->Signal(SIGCONT);
}
void Daemon::Terminate() {
  if (process_) process_->Signal(SIGTERM);
}
void Daemon::Interrupt() {
  if (process_) process_->Signal(SIGINT);
}
bool Daemon::running() { return process_ && process_->running(); }

ExitStatus Daemon::WaitForExit(Duration at_most) {
  if (process_) {
    const Result<ExitStatus> status = process_->Wait(at_most * Slowness());
    if (status) return *status;
  }
  ADD_FAILURE() << name_ << " did not end by itself\n" << Tail(log());
  return {.code = 0, .signal = -1};
}

Json CliResult::json() const {
  Json parsed = Json::parse(out, nullptr, false);
  if (!parsed.is_discarded()) return parsed;
  ADD_FAILURE() << "no JSON: '" << out << "', stderr: " << Tail(err);
  return nullptr;
}

RunningCli::RunningCli(const Args& args, const std::string& folder, const Args& launcher)
    : started_(steady_clock::now()) {
  static std::atomic<int> number{0};
  const std::string base = folder + "/cli-" + std::to_string(++number);
  out_path_ = base + ".out";
  err_path_ = base + ".err";
  const ChildOptions options = {.argv = CommandLine(launcher, "kvrelay", args),
                                .stdout_path = out_path_,
                                .stderr_path = err_path_};
  for (const std::string& arg : args) command_ += " " + arg;
  Result<ChildProcess> process = ChildProcess::Start(options);
  if (!process) {
    ADD_FAILURE() << process.error().ToString();
    return;
  }
  process_ = std::move(process).value();
}

void RunningCli::Signal(int signal) const {
  if (process_) process_->Signal(signal);
}

std::string RunningCli::out() const { return ReadFile(out_path_); }

CliResult RunningCli::Wait(Duration at_most) {
  CliResult result;
  if (process_) {
    const Result<ExitStatus> status = process_->Wait(at_most * Slowness());
    if (status && status->signal == 0) result.exit_code = status->code;
    if (!status || status->signal != 0) {
      ADD_FAILURE() << "kvrelay" << command_ << ": "
                    << (status ? status->ToString() : "did not end in time");
    }
    process_->Kill();
  }
  result.out = ReadFile(out_path_);
  result.err = ReadFile(err_path_);
  result.ms = MillisSince(started_);
  return result;
}

Story::Story() : folder_(NewFolder()) {}

void Story::EndDaemonsGently() {
  for (const auto& daemon : daemons_) {
    daemon->Thaw();
    daemon->Terminate();
  }
  for (const auto& daemon : daemons_) {
    if (daemon->running()) daemon->WaitForExit();
  }
}

void Story::ExpectNoSanitizerReports() {
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (!entry.is_regular_file()) continue;
    const std::string text = ReadFile(entry.path());
    const size_t report = std::min(text.find("Sanitizer: "), text.find(": runtime error: "));
    if (report == std::string::npos) continue;
    ADD_FAILURE() << entry.path().filename() << ": "
                  << text.substr(text.rfind('\n', report) + 1, kLogTail);
  }
}

Story::~Story() {
  if (Slowness() > 1) {
    EndDaemonsGently();
    ExpectNoSanitizerReports();
  }
  for (const auto& daemon : daemons_) {
    if (HasFailure()) std::cerr << "--- " << daemon->name() << "\n" << Tail(daemon->log()) << "\n";
    daemon->Kill();
  }
  std::error_code ignored;
  if (!folder_.empty()) fs::remove_all(folder_, ignored);
}

std::string Story::BundledModel() {
  for (const auto& entry : fs::directory_iterator(fs::path(KVRELAY_SOURCE_DIR) / "models")) {
    if (fs::exists(entry.path() / "config.json")) return entry.path().string();
  }
  ADD_FAILURE() << "no model under models/";
  return "";
}

Daemon& Story::Start(const std::string& name, Args args) {
  AddUnlessGiven(args, "model", BundledModel());
  AddUnlessGiven(args, "listen", "tcp://127.0.0.1:0");
  AddUnlessGiven(args, "run_dir", run_dir());
  AddUnlessGiven(args, "threads", "2");
  const std::string unique = name + "-" + std::to_string(daemons_.size());
  daemons_.push_back(std::make_unique<Daemon>(unique, args, folder_, launcher_));
  return *daemons_.back();
}

Daemon& Story::StartPrefill(Args flags) {
  flags.emplace_back("--role=prefill");
  return Start("prefill", std::move(flags));
}

Daemon& Story::StartDecode(const std::vector<Daemon*>& prefills, Args flags) {
  flags.emplace_back("--role=decode");
  std::string endpoints;
  for (const Daemon* prefill : prefills) {
    endpoints += (endpoints.empty() ? "" : ",") + prefill->endpoint();
  }
  AddUnlessGiven(flags, "prefill", endpoints);
  return Start("decode", std::move(flags));
}

CliResult Story::RunDaemon(const Args& args, Duration at_most) {
  const TimePoint start = steady_clock::now();
  const std::string log =
      folder_ + "/run-daemon-" + std::to_string(start.time_since_epoch().count());
  const ChildOptions options = {.argv = CommandLine(launcher_, "kvrelayd", args),
                                .stderr_path = log};
  CliResult result;
  Result<ChildProcess> process = ChildProcess::Start(options);
  if (!process) {
    ADD_FAILURE() << process.error().ToString();
    return result;
  }
  result.out = process->ReadRest(at_most * Slowness()).value_or("");
  const Result<ExitStatus> status = process->Wait(std::chrono::seconds(1) * Slowness());
  if (status && status->signal == 0) result.exit_code = status->code;
  EXPECT_TRUE(status) << "kvrelayd did not end by itself";
  process->Kill();
  result.err = ReadFile(log);
  result.ms = MillisSince(start);
  return result;
}

CliResult Story::Cli(const Args& args, Duration at_most) { return StartCli(args).Wait(at_most); }

RunningCli Story::StartCli(Args args) {
  const bool generates = !args.empty() && args.front() == "generate";
  if (generates && Slowness() > 1) {
    AddUnlessGiven(args, "timeout_ms", std::to_string(60'000 * Slowness()));
  }
  return {args, folder_, launcher_};
}

namespace {

std::vector<uint32_t> TokenIds(const CliResult& result) {
  if (result.exit_code != 0) {
    ADD_FAILURE() << "generate ended with " << result.exit_code << ": " << result.out << result.err;
    return {};
  }
  const Json json = result.json();
  if (!json.is_object() || !json.contains("token_ids")) return {};
  return json["token_ids"].get<std::vector<uint32_t>>();
}

}  // namespace

std::vector<uint32_t> Story::Generate(const Daemon& decode, const Args& flags) {
  Args args = {"generate", "--json", "--decode=" + decode.endpoint()};
  args.insert(args.end(), flags.begin(), flags.end());
  return TokenIds(Cli(args));
}

std::vector<uint32_t> Story::GenerateLocal(const Args& flags) {
  Args args = {"generate", "--json", "--local"};
  args.insert(args.end(), flags.begin(), flags.end());
  AddUnlessGiven(args, "model", BundledModel());
  return TokenIds(Cli(args));
}

Json Story::Inspect(const Daemon& daemon) {
  const CliResult result = Cli({"inspect", daemon.endpoint(), "--json",
                                "--timeout_ms=" + std::to_string(5000 * Slowness())});
  EXPECT_EQ(result.exit_code, 0) << daemon.name() << ": " << result.out << result.err;
  return result.exit_code == 0 ? result.json() : Json(nullptr);
}

bool Story::Eventually(const std::string& what, const std::function<bool()>& holds,
                       Duration at_most) {
  const TimePoint until = steady_clock::now() + at_most * Slowness();
  while (!holds()) {
    if (steady_clock::now() >= until) {
      ADD_FAILURE() << "not in time: " << what;
      return false;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return true;
}

void Story::ExpectIdle(const Daemon& daemon) {
  Json last;
  const bool idle = Eventually(daemon.name() + " is idle", [&] {
    last = Inspect(daemon);
    if (!last.is_object()) return false;
    const Json& blocks = last["blocks"];
    return last["leases"].empty() && last["sessions"].empty() && blocks["quarantine"] == 0 &&
           blocks["used"].get<uint64_t>() ==
               blocks["kept"].get<uint64_t>() + blocks["shared"].get<uint64_t>();
  });
  if (!idle) ADD_FAILURE() << last.dump(2);
}

}  // namespace kvrelay::integration
