#include "transport/control_side.h"

#include <utility>

namespace kvrelay::transport {

PeerHandle ControlSide::Watch(std::function<void(Result<PeerHandle>)> connected,
                              std::function<void()> on_death) {
  const PeerHandle peer = NextId();
  watched_->emplace(peer, Callbacks{std::move(connected), std::move(on_death)});
  return peer;
}

void ControlSide::Deliver(Done done, Completion completion) const {
  executor_([done = std::move(done), completion = std::move(completion)]() mutable {
    done(std::move(completion));
  });
}

void ControlSide::Refuse(Done done, Status why) const {
  Completion refused;
  refused.status = std::move(why);
  Deliver(std::move(done), std::move(refused));
}

// Callbacks may connect and disconnect: they are taken out of the map before they are called.
void ControlSide::Connected(PeerHandle peer) const {
  executor_([watched = watched_, peer] {
    const auto it = watched->find(peer);
    if (it == watched->end()) return;
    const auto connected = std::exchange(it->second.connected, nullptr);
    connected(peer);
  });
}

void ControlSide::Lost(PeerHandle peer, Status why) const {
  executor_([watched = watched_, peer, why = std::move(why)]() mutable {
    const auto node = watched->extract(peer);
    if (node.empty()) return;
    if (const auto& connected = node.mapped().connected) {
      connected(Error(std::move(why)));
    } else {
      node.mapped().on_death();
    }
  });
}

}  // namespace kvrelay::transport
