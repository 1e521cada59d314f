#include "kvcache/pull_frontier.h"

#include <algorithm>

namespace kvrelay {

PullFrontier::PullFrontier(const PullPiece& all, uint32_t unit)
    : all_(all), unit_(unit), done_(all.layer_end - all.layer_begin, all.tokens.begin) {}

std::optional<PullPiece> PullFrontier::Next(const Progress& progress) {
  const auto computed = [&](uint32_t layer) {
    const bool in_chunk = layer < progress.layers;
    const uint32_t end = in_chunk ? std::max(progress.tokens, progress.chunk_end) : progress.tokens;
    return end >= all_.tokens.end ? all_.tokens.end : end / unit_ * unit_;
  };
  PullPiece best;
  uint64_t most = 0;
  for (uint32_t first = all_.layer_begin; first < all_.layer_end;) {
    const TokenRange tokens{done_[first - all_.layer_begin], computed(first)};
    uint32_t end = first + 1;
    while (end < all_.layer_end && done_[end - all_.layer_begin] == tokens.begin &&
           computed(end) == tokens.end) {
      ++end;
    }
    if (tokens.begin < tokens.end && uint64_t{end - first} * tokens.size() > most) {
      most = uint64_t{end - first} * tokens.size();
      best = {first, end, tokens};
    }
    first = end;
  }
  if (most == 0) return std::nullopt;
  for (uint32_t layer = best.layer_begin; layer < best.layer_end; ++layer) {
    done_[layer - all_.layer_begin] = best.tokens.end;
  }
  return best;
}

bool PullFrontier::complete() const {
  return std::ranges::all_of(done_, [this](uint32_t done) { return done >= all_.tokens.end; });
}

}  // namespace kvrelay
