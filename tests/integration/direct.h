// A peer that is no daemon: talks to a prefill daemon's listeners in this process, one message at a
// time, with whatever a test wants to say.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/client.h"
#include "base/status.h"
#include "base/wake_queue.h"
#include "kvcache/lease_record.h"
#include "kvcache/region.h"
#include "proto/messages.h"
#include "transport/transport.h"

namespace kvrelay::integration {

// Token ids of some prompt of that length; another one for each `seed`.
std::vector<uint32_t> Tokens(size_t count, uint32_t seed = 1);

class DirectReader {
 public:
  // `front`: of a prefill daemon.
  explicit DirectReader(std::string front);

  const proto::PingReply& owner() const { return owner_; }  // the daemon, as it was at the start
  const EngineId& engine() const { return engine_; }        // ours

  // Has the prompt computed; its ticket once all KV is published.
  Result<proto::Ticket> Prefill(const std::vector<uint32_t>& token_ids,
                                const std::vector<uint32_t>& system_ids = {});
  // The claim that a well-behaved reader would make for the ticket's own part.
  proto::Claim ClaimFor(const proto::Ticket& ticket) const;
  Result<proto::ClaimReply> Claim(const proto::Ticket& ticket) { return Send(ClaimFor(ticket)); }
  Result<proto::ClaimReply> Send(const proto::Claim& claim);
  Status Release(const proto::Ticket& ticket);
  // The leases among these that are over.
  Result<std::vector<LeaseId>> Heartbeat(const proto::Ticket& ticket);

  Result<proto::Meta> GetMeta(const proto::ClaimRank& rank);
  // One that is right for all tokens, layers and heads of that rank.
  proto::PackedRead ReadFor(const proto::Ticket& ticket, const proto::ClaimRank& rank,
                            const proto::Meta& meta) const;
  Status Send(const std::string& rank_endpoint, const proto::PackedRead& read);
  // What that rank's lease record says as long as the ticket's lease lives.
  GuardExpectation GuardFor(const proto::Ticket& ticket, const proto::ClaimReply& claim,
                            const proto::ClaimRank& rank, const proto::Meta& meta) const;

  // Any request to any listener of the daemon.
  Result<std::string> Call(const std::string& endpoint, proto::Type type, std::string body);

 private:
  const std::string front_;
  std::optional<agent::Client> client_;
  proto::PingReply owner_;
  EngineId engine_;
};

// One rank's memory, mapped as a reader maps it.
class DirectMapping {
 public:
  DirectMapping(const proto::Meta& meta, const std::string& run_dir);
  ~DirectMapping();

  const Status& status() const { return status_; }  // of connecting
  // Copies all of the claim's tokens to the same places of `memory`.
  transport::Completion Read(const proto::ClaimReply& claim, const proto::ClaimRank& rank);
  std::vector<std::byte> memory() const;  // of region 0, as it is now

 private:
  // Runs what the transport hands to its control thread, which is this one, until `done`.
  void RunUntil(const std::function<bool()>& done);

  const proto::Meta meta_;
  WakeQueue<std::function<void()>> control_{1024};
  std::vector<Region> memory_;  // by region
  std::unique_ptr<transport::Transport> transport_;
  transport::PeerHandle peer_ = 0;
  Status status_;
};

}  // namespace kvrelay::integration
