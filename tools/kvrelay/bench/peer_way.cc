// Other systems, each a program beside us.
#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include "tools/common/child_process.h"
#include "tools/kvrelay/bench/pull_way.h"

namespace kvrelay::tools {
namespace {

constexpr Duration kAnswerLimit = std::chrono::seconds(60);
constexpr Duration kAwake = std::chrono::milliseconds(2);  // until all its threads run again

// Between questions its processes stand still: some have threads that never sleep, and would take
// the processors from whoever is measured next.
class PeerWay final : public PullWay {
 public:
  PeerWay(std::string name, ChildProcess process, std::string folder)
      : PullWay(std::move(name), 1), process_(std::move(process)), folder_(std::move(folder)) {
    process_.Signal(SIGSTOP);
  }

  Status Prepare(const PullCase& pull) override {
    const std::string file = folder_ + "/case";
    std::ofstream out(file, std::ios::binary | std::ios::trunc);
    const auto put = [&out](uint64_t value) {
      out.write(reinterpret_cast<const char*>(&value), sizeof(value));
    };
    put(pull.slice_bytes);
    put(pull.count);
    for (const CopySegment& slice : pull.slices) {
      put(slice.src);
      put(slice.dst);
    }
    if (!out.flush()) return {Code::kResourceExhausted, "cannot write " + file};
    return Ask("case " + file).has_value() ? Status() : failure_;
  }
  Result<double> Pull(const PullCase&) override {
    KVRELAY_ASSIGN_OR_RETURN(const std::string seconds, Ask("pull"));
    return std::strtod(seconds.c_str(), nullptr);
  }
  Status Erase(const PullCase&) override { return Ask("erase").has_value() ? Status() : failure_; }
  Result<bool> Holds(const PullCase&) override {
    KVRELAY_ASSIGN_OR_RETURN(const std::string answer, Ask("check"));
    return answer == "right";
  }

 private:
  Result<std::string> Ask(const std::string& line) {
    process_.Signal(SIGCONT);
    std::this_thread::sleep_for(kAwake);
    failure_ = process_.Write(line + "\n");
    if (!failure_.ok()) return Error(failure_);
    Result<std::string> answer = process_.ReadLine(kAnswerLimit);
    process_.Signal(SIGSTOP);
    if (!answer.has_value()) {
      failure_ = answer.error();
    } else if (answer->starts_with("failed")) {
      failure_ = {Code::kInternal, *answer};
    }
    if (!failure_.ok()) return Error(failure_);
    return answer;
  }

  ChildProcess process_;
  const std::string folder_;
  Status failure_;
};

Result<ChildProcess> StartPeer(const std::string& command, const std::string& log) {
  KVRELAY_ASSIGN_OR_RETURN(
      ChildProcess process,
      ChildProcess::Start(
          {.argv = {"/bin/sh", "-c", command}, .stdin_pipe = true, .stderr_path = log}));
  KVRELAY_ASSIGN_OR_RETURN(const std::string ready, process.ReadLine(kAnswerLimit));
  if (ready != "ready") return Error(Code::kInternal, ready);
  return process;
}

}  // namespace

void OpenPeerWays(const std::string& file, const std::string& folder, uint64_t memory_bytes,
                  PullWays& out) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    const size_t tab = line.find('\t');
    if (tab == std::string::npos) continue;
    const std::string name = line.substr(0, tab);
    const std::string log = folder + "/peer-" + std::to_string(out.ways.size());
    auto process =
        StartPeer("exec " + line.substr(tab + 1) + " " + std::to_string(memory_bytes), log);
    if (process.has_value()) {
      out.ways.push_back(std::make_unique<PeerWay>(name, std::move(*process), folder));
    } else {
      std::ifstream says(log);
      std::string last;
      for (std::string text; std::getline(says, text);) last = text;
      out.refused.emplace_back(name, process.error().message() + ": " + last);
    }
  }
}

}  // namespace kvrelay::tools
