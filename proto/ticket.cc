#include "proto/ticket.h"

#include <charconv>
#include <optional>
#include <span>

#include "base/hash.h"
#include "proto/base64url.h"
#include "proto/codec.h"

namespace kvrelay::proto {
namespace {

constexpr std::string_view kPrefix = "kvt";
constexpr size_t kChecksumBytes = 8;

std::string Checksum(std::string_view bytes) {
  const ContentHash hash =
      HashBytes(std::as_bytes(std::span(bytes.data(), bytes.size())), "ticket");
  return {reinterpret_cast<const char*>(hash.bytes.data()), kChecksumBytes};
}

::kvrelay::Error Bad(std::string what) {
  return {Code::kInvalidArgument, "TICKET: " + std::move(what)};
}

}  // namespace

std::string EncodeTicket(const Ticket& ticket) {
  std::string bytes = Encode(ticket);
  bytes += Checksum(bytes);
  return std::string(kPrefix) + std::to_string(kTicketVersion) + "." + ToBase64Url(bytes);
}

Result<Ticket> DecodeTicket(std::string_view text) {
  if (text.size() > kMaxTicketText) {
    return Bad(std::to_string(text.size()) + " characters, more than " +
               std::to_string(kMaxTicketText));
  }
  const size_t dot = text.find('.');
  if (!text.starts_with(kPrefix) || dot == std::string_view::npos) {
    return Bad("does not begin with 'kvt" + std::to_string(kTicketVersion) + ".'");
  }
  uint32_t version = 0;
  const char* const digits_end = text.data() + dot;
  const auto parsed = std::from_chars(text.data() + kPrefix.size(), digits_end, version);
  if (parsed.ec != std::errc() || parsed.ptr != digits_end) return Bad("has no version number");
  if (version != kTicketVersion) {
    return ::kvrelay::Error(Code::kIncompatible, "TICKET: version " + std::to_string(version) +
                                                     ", we understand " +
                                                     std::to_string(kTicketVersion));
  }
  const std::optional<std::string> bytes = FromBase64Url(text.substr(dot + 1));
  if (!bytes || bytes->size() < kChecksumBytes) return Bad("is not base64url; cut off or damaged");
  const std::string_view all = *bytes;
  const std::string_view body = all.substr(0, all.size() - kChecksumBytes);
  if (all.substr(body.size()) != Checksum(body)) return Bad("has a wrong checksum; damaged");
  return Decode<Ticket>(body);
}

}  // namespace kvrelay::proto
