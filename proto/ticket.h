// A ticket as one line of text, for the way through other people's routers, logs and JSON:
//   "kvt1." base64url(msgpack map of the Ticket, then 8 bytes of its BLAKE2b)
// The checksum finds damage and truncation, not forgery: what a ticket is good for rests on its
// random lease id.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "base/status.h"
#include "proto/messages.h"

namespace kvrelay::proto {

inline constexpr uint32_t kTicketVersion = 1;
inline constexpr size_t kMaxTicketText = 8192;

// Letters, digits, '-', '_' and one '.'.
std::string EncodeTicket(const Ticket& ticket);

// kInvalidArgument (not a ticket, damaged, a field), kIncompatible (another version; names both).
Result<Ticket> DecodeTicket(std::string_view text);

}  // namespace kvrelay::proto
