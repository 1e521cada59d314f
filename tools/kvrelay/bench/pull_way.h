// The ways to pull that `kvrelay bench pull` compares.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tools/kvrelay/bench/channel.h"
#include "tools/kvrelay/bench/owner.h"
#include "tools/kvrelay/bench/pull_case.h"
#include "tools/kvrelay/bench/side.h"

namespace kvrelay::tools {

// One way. Used by the thread that made it.
class PullWay {
 public:
  // `threads`: of ParallelFor while it pulls.
  PullWay(std::string name, int threads) : name_(std::move(name)), threads_(threads) {}
  virtual ~PullWay() = default;

  const std::string& name() const { return name_; }
  int threads() const { return threads_; }
  bool copies_bytes() const { return copies_bytes_; }  // false: the pattern does not come
  // The other process makes the case from its numbers: it must be as PullCase::Make makes it.
  virtual bool remakes_case() const { return false; }

  // What needs to be known before the pull: outside the measured time.
  virtual Status Prepare(const PullCase&) { return {}; }
  // Seconds from the call to its completion. After Prepare of the same case.
  virtual Result<double> Pull(const PullCase& pull) = 0;
  // Destroys what lies where a case's slices land, and looks whether they lie there.
  virtual Status Erase(const PullCase& pull) = 0;
  virtual Result<bool> Holds(const PullCase& pull) = 0;

 protected:
  bool copies_bytes_ = true;

 private:
  const std::string name_;
  const int threads_;
};

// The reader's side of all that happens in this process and the owner's.
struct ReaderContext {
  Side& side;
  Channel& owner;
  UniqueFd socket;  // plain TCP
};

struct PullWays {
  std::vector<std::unique_ptr<PullWay>> ways;
  // Carries out plans of the owner's memory by the first one-sided transport, all at once; seconds
  // that it took. Null when there is none.
  std::function<Result<double>(const std::vector<CopyPlan>& plans)> read_plans;
  // Of small cases: the copy of a plan and nothing else, and with the lease's check, both on the
  // calling thread. Empty when no transport can.
  std::vector<std::unique_ptr<PullWay>> near_ways;
  // Seconds from the owner's address to the first byte read, by transport; the connection is gone
  // afterwards.
  std::vector<std::pair<std::string, std::function<Result<double>()>>> connects;
  std::vector<std::pair<std::string, std::string>> refused;  // name, and why it is not there
};

// Exchanges what the owner says first. Ways that can use several threads are there once for each
// number of `threads`.
Result<PullWays> OpenWays(ReaderContext& context, pid_t owner, const std::vector<int>& threads);

// Other systems, as programs: each line of `file` is a name, a tab, and a shell command; the
// program is told the memory's size in bytes as its last argument and talks in lines:
//   it:  ready                    us: case FILE    (u64: slice, count, then the pairs src, dst)
//   it:  ok                       us: erase | pull | check
//   it:  ok | SECONDS | right or wrong; or "failed WHY" to anything
void OpenPeerWays(const std::string& file, const std::string& folder, uint64_t memory_bytes,
                  PullWays& out);

}  // namespace kvrelay::tools
