// Whose piece is next, where operations share a thread.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "base/priority.h"
#include "transport/transport.h"

namespace kvrelay::transport {

// The most urgent operations go first, whoever waits. Sessions of one priority take turns of as
// many bytes: one that used up its turn goes behind all others, where new ones begin, too; one that
// has nothing to move is passed over and keeps its turn. So two sessions that always have something
// to move are never apart by more than a turn and a piece.
//
// One thread. Places may outlive it.
class Turns {
 public:
  // `turn_bytes`: not less than a piece.
  explicit Turns(uint64_t turn_bytes) : turn_bytes_(turn_bytes) {}
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;

  // One operation's, and its session's as long as one of its operations has one.
  class Place {
   public:
    Place() = default;  // nobody's: only to be assigned to

    Priority priority() const { return priority_; }
    // Of one session neither is before the other.
    bool Before(const Place& other) const {
      return priority_ != other.priority_ ? priority_ > other.priority_
                                          : session_->turn < other.session_->turn;
    }

   private:
    friend class Turns;
    struct Session {
      uint64_t turn = 0;   // in the order of all turns
      uint64_t moved = 0;  // bytes, in this turn
    };
    Place(Priority priority, std::shared_ptr<Session> session)
        : priority_(priority), session_(std::move(session)) {}

    Priority priority_ = Priority::kPrefetch;
    std::shared_ptr<Session> session_;
  };

  Place Enter(const Terms& terms);
  // What goes over a turn counts for the next one.
  void Moved(const Place& place, uint64_t bytes);

 private:
  using Session = Place::Session;

  const uint64_t turn_bytes_;
  uint64_t next_turn_ = 0;
  using Sessions = std::unordered_map<uint64_t, std::weak_ptr<Session>>;
  const std::shared_ptr<Sessions> sessions_ = std::make_shared<Sessions>();
};

// Which of `ops` is next among those that `may` go: an iterator, the end when none may. Each op has
// its `place`, or points to what has; of equal ones the first.
template <typename Ops, typename May>
auto NextInTurn(Ops& ops, const May& may) {
  const auto place_of = [](const auto& op) -> const Turns::Place& {
    if constexpr (requires { op.place; }) {
      return op.place;
    } else {
      return op->place;
    }
  };
  auto next = ops.end();
  for (auto it = ops.begin(); it != ops.end(); ++it) {
    if ((next == ops.end() || place_of(*it).Before(place_of(*next))) && may(*it)) next = it;
  }
  return next;
}

}  // namespace kvrelay::transport
