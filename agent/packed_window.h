// How much of packed streams a rank asks owners for at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "base/priority.h"

namespace kvrelay::agent {

// Bounds the bytes that were asked for and have not been taken, over all owners: each of them sends
// as fast as it may. Control thread.
class PackedWindow {
 public:
  using Id = uint64_t;  // of a piece of a stream; 0 is never one

  // 0: no bound.
  explicit PackedWindow(uint64_t limit) : limit_(limit) {}

  // The longest piece that streams are asked for in, `least` at least: several of them fit, so that
  // one is on its way while the next is asked for.
  uint64_t PieceBytes(uint64_t least) const {
    return limit_ == 0 ? UINT64_MAX : std::max(limit_ / 4, least);
  }
  // A piece that wants to be asked for: `go` runs once, inside an Admit, when no more than the
  // limit is asked for with it, or nothing else is. Of those that wait the more urgent go first,
  // then who came first; a piece for which there is no room lets nobody pass.
  Id Enter(Priority priority, uint64_t bytes, std::function<void(Id)> go);
  // It has arrived or is given up. Ignored when it has left.
  void Leave(Id id);
  // Lets go for whom there is room now.
  void Admit();

 private:
  struct Piece {
    uint64_t bytes = 0;
    std::function<void(Id)> go;
  };
  using Place = std::pair<int, Id>;  // the more urgent first

  const uint64_t limit_;
  Id ids_ = 0;
  uint64_t asked_ = 0;           // bytes
  std::map<Id, uint64_t> open_;  // asked for: bytes
  std::map<Place, Piece> waiting_;
};

}  // namespace kvrelay::agent
