// Bytes from anybody -> a msgpack object tree within the limits. Private to proto/.
#pragma once

#include <msgpack.hpp>
#include <string_view>

#include "base/status.h"

namespace kvrelay::proto {

// A parsed message. Strings point into the bytes that were parsed, which must live as long.
struct ParsedMap {
  msgpack::zone zone;
  msgpack::object root;  // a map
};

// Exactly one map, no byte after it. Walks the bytes once without allocating before it builds the
// tree, so that a short message cannot ask for much memory: a tree costs at most kMaxObjects * 24
// bytes. Errors begin with `name`: "CLAIM: truncated".
Status ParseMap(std::string_view name, std::string_view bytes, uint64_t max_bytes, ParsedMap& out);

}  // namespace kvrelay::proto
