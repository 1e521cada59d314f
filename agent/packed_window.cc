#include "agent/packed_window.h"

namespace kvrelay::agent {

PackedWindow::Id PackedWindow::Enter(Priority priority, uint64_t bytes,
                                     std::function<void(Id)> go) {
  const Id id = ++ids_;
  waiting_[{-static_cast<int>(priority), id}] = {bytes, std::move(go)};
  return id;
}

void PackedWindow::Admit() {
  while (!waiting_.empty()) {
    const auto first = waiting_.begin();
    const uint64_t bytes = first->second.bytes;
    const bool room = limit_ == 0 || asked_ == 0 || (bytes <= limit_ && asked_ <= limit_ - bytes);
    if (!room) return;
    const Id id = first->first.second;
    const auto go = std::move(first->second.go);
    open_[id] = bytes;
    asked_ += bytes;
    waiting_.erase(first);
    go(id);  // may enter, leave and admit
  }
}

void PackedWindow::Leave(Id id) {
  if (const auto it = open_.find(id); it != open_.end()) {
    asked_ -= it->second;
    open_.erase(it);
  } else {
    std::erase_if(waiting_, [id](const auto& entry) { return entry.first.second == id; });
  }
}

}  // namespace kvrelay::agent
