// One request's KV cache from some prefill worker: ask one, take its ticket, load, and on a failure
// that another try can mend ask another, within a budget and the request's deadline.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "agent/load.h"
#include "agent/prefill_pool.h"

namespace kvrelay::agent {

struct FetchRequest {
  std::string request_id;
  std::vector<uint32_t> system_ids;
  std::vector<uint32_t> token_ids;
  ContentHash prompt_hash;                  // what the ticket must say
  ContentHash prefix_hash;                  // zero when nothing is shared
  uint32_t prefix_tokens = 0;               // whole blocks of ours
  std::vector<ContentHash> prefix_names{};  // as in SystemPrefix
  // Another share of the destination blocks, for each try: of positions from held_tokens on.
  std::function<HeldTables()> blocks;
  uint32_t held_tokens = 0;           // the KV of the positions before is here, or the prefix's
  std::vector<proto::Reuse> reuse{};  // what the worker may take from us; at most one
  Priority priority = Priority::kDecode;
  TimePoint deadline;
};

struct FetchResult {
  LoadResult load;
  std::string prefill;  // endpoint used
  uint32_t retries = 0;
  double queue_ms = 0;  // in the prefill worker
  double compute_ms = 0;
  uint32_t computed_tokens = 0;  // in compute_ms
  uint32_t reused_tokens = 0;    // that it took from us: bytes, and how long that took
  uint64_t reuse_bytes = 0;
  double reuse_ms = 0;
  double wait_ms = 0;  // from the finished prefill to the KV here
};

struct FetchOptions {
  int max_retries = 2;
  Duration accept_timeout =
      Millis(5000);  // a prefill worker offers at once; silence means that it hangs
  Duration load_timeout =
      Millis(30'000);  // from the finished prefill to the KV here (--pull_timeout_ms)
  bool stream = true;  // pull while the prompt is computed, not after it (--stream_pulls)
};

// Control thread of the leader. From Start until it is over its context keeps it.
class Fetch : public std::enable_shared_from_this<Fetch> {
 public:
  // `finished` exactly once, never inside Start or Cancel. When it runs with an error, every
  // destination block is drained: nothing writes them any more.
  Fetch(ReaderContext& context, PrefixTable& prefixes, PrefillPool& pool, FetchOptions options,
        FetchRequest request, std::function<void(Result<FetchResult>)> finished);

  void Start();
  void Cancel(const Status& why);

 private:
  void Try();
  void OnPrefillReply(const Result<std::string>& body, bool more);
  Status CheckTicket(const proto::Ticket& ticket) const;
  void OnComputed(const proto::PrefillReply& reply);
  void OnLoaded(const Result<LoadResult>& result);
  void EndIfComplete();
  void OnDrained();
  void EndTry(const Status& status);
  void AfterTry();
  void Finish(Result<FetchResult> result);
  uint32_t tokens() const;

  ReaderContext& context_;
  PrefixTable& prefixes_;
  PrefillPool& pool_;
  const FetchOptions options_;
  FetchRequest request_;
  std::function<void(Result<FetchResult>)> finished_;

  std::set<std::string> tried_;
  int tries_ = 0;
  Status cancelled_;  // why, once the user or the deadline ended it

  // Of the current try.
  std::string endpoint_;
  Rpc::CallId call_ = 0;
  Clock::TimerId timer_ = 0;
  Clock::TimerId deadline_timer_ = 0;
  std::shared_ptr<Load> load_;
  bool trying_ = false;
  bool computed_ = false;  // the prefill worker has finished
  bool loaded_ = false;    // the KV is here
  TimePoint computed_at_;
  Status failure_;
  FetchResult result_;
};

}  // namespace kvrelay::agent
