#include "agent/kv_connector.h"

namespace kvrelay::agent {

KvConnector::LoadId KvConnector::NewId() {
  const std::lock_guard lock(mutex_);
  return next_++;
}

KvConnector::LoadId KvConnector::Offer(OfferRequest request) {
  const LoadId id = NewId();
  auto held = std::make_shared<OfferRequest>(std::move(request));
  agent_.Post([this, id, held] {
    const proto::TicketPart part{
        .lease = {}, .hash = held->hash, .first_token = held->first_token, .tokens = held->tokens};
    agent_.owner().Offer(std::move(*held), [this, id, part](const Result<LeaseId>& lease) {
      const std::lock_guard lock(mutex_);
      if (!lease.has_value()) {
        finished_.offers.emplace_back(id, Error(lease.error()));
        return;
      }
      proto::Ticket ticket{.owner = agent_.engine(),
                           .incarnation = agent_.incarnation(),
                           .front = agent_.endpoint(),
                           .model = agent_.model(),
                           .prompt = part,
                           .prefixes = {}};
      ticket.prompt.lease = *lease;
      finished_.offers.emplace_back(id, std::move(ticket));
    });
  });
  return id;
}

KvConnector::LoadId KvConnector::StartLoadKv(LoadRequest request) {
  const LoadId id = NewId();
  if (host_ != nullptr) {
    const std::lock_guard lock(mutex_);
    received_[id] = request.blocks.Share();
  }
  auto held = std::make_shared<LoadRequest>(std::move(request));
  agent_.Post([this, id, held] {
    const auto load =
        agent_.StartLoad(std::move(*held), {.finished =
                                                [this, id](const Result<LoadResult>& result) {
                                                  const std::lock_guard lock(mutex_);
                                                  finished_.loads.emplace_back(id, result);
                                                },
                                            .drained =
                                                [this, id] {
                                                  loads_.erase(id);
                                                  const std::lock_guard lock(mutex_);
                                                  finished_.drained.push_back(id);
                                                }});
    loads_[id] = load;
    load->SetReady();
  });
  return id;
}

void KvConnector::Cancel(LoadId id) {
  agent_.Post([this, id] {
    const auto it = loads_.find(id);
    if (it == loads_.end()) return;
    const std::shared_ptr<Load> load = it->second.lock();
    if (load) load->Cancel({Code::kCancelled, "the engine cancelled the load"});
  });
}

KvConnector::Finished KvConnector::GetFinished() {
  const std::lock_guard device(device_mutex_);
  Finished finished;
  std::vector<HeldTables> own;  // of finished.loads
  {
    const std::lock_guard lock(mutex_);
    finished = std::exchange(finished_, {});
    if (host_ == nullptr) return finished;
    for (const auto& [id, result] : finished.loads) {
      const auto it = received_.find(id);
      own.push_back(std::move(it->second));
      received_.erase(it);
    }
  }
  for (size_t i = 0; i < own.size(); ++i) {
    Result<LoadResult>& result = finished.loads[i].second;
    if (!result.has_value()) continue;
    if (Status status = SyncToDevice(own[i], result->prefix); !status.ok()) {
      result = Error(status.Wrap("copying to the device"));
    }
  }
  return finished;
}

Status KvConnector::SyncToDevice(const HeldTables& own, const PrefixRef& prefix) {
  std::erase_if(on_device_, [](const auto& gone) { return gone.expired(); });
  if (prefix != nullptr && !on_device_.contains(prefix)) {
    KVRELAY_RETURN_IF_ERROR(host_->SyncRecvedKvToDevice(prefix->blocks.blocks()));
    on_device_.insert(prefix);
  }
  for (const KvTable& table : own.tables()) {
    KVRELAY_RETURN_IF_ERROR(host_->SyncRecvedKvToDevice(table.blocks));
  }
  return Status::Ok();
}

}  // namespace kvrelay::agent
