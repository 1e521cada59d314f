#include "transport/mapped_address.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <fstream>

namespace kvrelay::transport {
namespace {

constexpr std::string_view kVersion = "kvrelay-mapped-1";
constexpr size_t kMaxBytes = 512;

// Cuts the text before the next space off `rest`.
std::string_view NextField(std::string_view& rest) {
  const size_t space = rest.find(' ');
  const std::string_view field = rest.substr(0, space);
  rest = space == std::string_view::npos ? std::string_view() : rest.substr(space + 1);
  return field;
}

template <typename T>
bool ParseNumber(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

Result<HostIdentity> ThisHost(const std::string& host_id) {
  HostIdentity host{.host_id = host_id, .uid = geteuid()};
  if (host_id.empty()) {
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    if (!(file >> host.host_id) || host.host_id.empty()) {
      return Error(Code::kInternal, "cannot read /proc/sys/kernel/random/boot_id");
    }
  }
  const bool is_word = std::ranges::all_of(host.host_id, [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == '.';
  });
  if (!is_word || host.host_id.size() > HostIdentity::kMaxHostId) {
    return Error(Code::kInvalidArgument, "--host_id=" + host_id + " needs at most " +
                                             std::to_string(HostIdentity::kMaxHostId) +
                                             " letters, digits, '-', '_' or '.'");
  }
  return host;
}

std::string MappedAddress::Encode() const {
  return std::string(kVersion) + ' ' + host.host_id + ' ' + std::to_string(host.uid) + ' ' +
         std::to_string(nonce) + ' ' + socket_path;
}

Result<MappedAddress> MappedAddress::Decode(std::string_view text) {
  const Status bad(Code::kInvalidArgument, "not an address of the mapped transport");
  if (text.size() > kMaxBytes || text.find('\0') != std::string_view::npos) return Error(bad);
  MappedAddress address;
  if (NextField(text) != kVersion) return Error(bad);
  address.host.host_id = NextField(text);
  if (address.host.host_id.empty() || !ParseNumber(NextField(text), address.host.uid) ||
      !ParseNumber(NextField(text), address.nonce)) {
    return Error(bad);
  }
  address.socket_path = text;  // the rest: a path may hold spaces
  if (address.socket_path.empty() || address.socket_path[0] != '/') return Error(bad);
  return address;
}

Status CheckSameHost(const HostIdentity& owner, const HostIdentity& self) {
  if (owner.host_id != self.host_id) {
    return Error(Code::kPeerUnreachable,
                 "another host: the owner's id is " + owner.host_id + ", ours " + self.host_id);
  }
  if (owner.uid != self.uid) {
    return Error(Code::kPeerUnreachable, "another user: the owner runs as uid " +
                                             std::to_string(owner.uid) + ", we as " +
                                             std::to_string(self.uid));
  }
  return {};
}

}  // namespace kvrelay::transport
