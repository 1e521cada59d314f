#include "transport/mapped_address.h"

#include <unistd.h>

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

Result<HostIdentity> ThisHost() {
  HostIdentity host;
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  if (!(file >> host.boot_id) || host.boot_id.empty()) {
    return Error(Code::kInternal, "cannot read /proc/sys/kernel/random/boot_id");
  }
  host.uid = geteuid();
  return host;
}

std::string MappedAddress::Encode() const {
  return std::string(kVersion) + ' ' + host.boot_id + ' ' + std::to_string(host.uid) + ' ' +
         std::to_string(nonce) + ' ' + socket_path;
}

Result<MappedAddress> MappedAddress::Decode(std::string_view text) {
  const Status bad(Code::kInvalidArgument, "not an address of the mapped transport");
  if (text.size() > kMaxBytes || text.find('\0') != std::string_view::npos) return Error(bad);
  MappedAddress address;
  if (NextField(text) != kVersion) return Error(bad);
  address.host.boot_id = NextField(text);
  if (address.host.boot_id.empty() || !ParseNumber(NextField(text), address.host.uid) ||
      !ParseNumber(NextField(text), address.nonce)) {
    return Error(bad);
  }
  address.socket_path = text;  // the rest: a path may hold spaces
  if (address.socket_path.empty() || address.socket_path[0] != '/') return Error(bad);
  return address;
}

Status CheckSameHost(const HostIdentity& owner, const HostIdentity& self) {
  if (owner.boot_id != self.boot_id) {
    return Error(Code::kPeerUnreachable, "another host: the owner's kernel has boot id " +
                                             owner.boot_id + ", ours " + self.boot_id);
  }
  if (owner.uid != self.uid) {
    return Error(Code::kPeerUnreachable, "another user: the owner runs as uid " +
                                             std::to_string(owner.uid) + ", we as " +
                                             std::to_string(self.uid));
  }
  return {};
}

}  // namespace kvrelay::transport
