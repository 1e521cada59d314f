#include "transport/turns.h"

#include <utility>

namespace kvrelay::transport {

Turns::Place Turns::Enter(const Terms& terms) {
  const auto begin = [this](auto forget) {
    return std::shared_ptr<Session>(new Session{.turn = next_turn_++}, forget);
  };
  if (terms.session == 0) return {terms.priority, begin(std::default_delete<Session>())};
  std::weak_ptr<Session>& known = (*sessions_)[terms.session];
  std::shared_ptr<Session> session = known.lock();
  if (session == nullptr) {
    session = begin([sessions = std::weak_ptr(sessions_), id = terms.session](Session* ended) {
      if (const auto left = sessions.lock()) left->erase(id);
      delete ended;
    });
    known = session;
  }
  return {terms.priority, std::move(session)};
}

void Turns::Moved(const Place& place, uint64_t bytes) {
  Session& session = *place.session_;
  session.moved += bytes;
  if (session.moved < turn_bytes_) return;
  session.moved -= turn_bytes_;
  session.turn = next_turn_++;
}

}  // namespace kvrelay::transport
