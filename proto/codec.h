// Message structs <-> bytes: msgpack maps with the struct field names as keys (schema.h says which,
// limits.h how large).
//
// Decode takes bytes from anybody. Unknown fields are ignored, so that a newer minor version can
// add some. Everything else that is not exactly the message is an error that names message and
// field: "CLAIM: field 'lease' is missing", "META: field 'layout.k[3].offset' is not a number >=
// 0". Memory is allocated only for what passed its limit.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "proto/messages.h"

namespace kvrelay::proto {

// Any thread; no state. Both exist for every struct in messages.h, and for no other type.
template <typename T>
std::string Encode(const T& message);

// kTooLarge above kMaxBodyBytes, else kInvalidArgument.
template <typename T>
Result<T> Decode(std::string_view bytes);

}  // namespace kvrelay::proto
