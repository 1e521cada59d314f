#include "tools/common/endpoint.h"

#include <algorithm>

#include "tools/common/flag_text.h"

namespace kvrelay::tools {

std::string Endpoint::ToString() const {
  const bool is_ipv6 = host.find(':') != std::string::npos;
  return transport::KeyedEndpoint{
      .endpoint = "tcp://" + (is_ipv6 ? "[" + host + "]" : host) + ":" + std::to_string(port),
      .key = key}
      .ToText();
}

bool Endpoint::IsLoopback() const {
  return host == "localhost" || host == "::1" || host.starts_with("127.");
}

bool Endpoint::IsWildcard() const { return host == "*" || host == "0.0.0.0" || host == "::"; }

Result<Endpoint> ParseEndpoint(std::string_view text, AnyPort any_port) {
  KVRELAY_ASSIGN_OR_RETURN(const auto keyed, transport::KeyedEndpoint::FromText(text));
  std::string_view rest = keyed.endpoint;
  if (rest.starts_with("tcp://")) rest.remove_prefix(6);
  const size_t colon = rest.rfind(':');
  std::string_view host = rest.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    host = {};
  }
  const bool bad_host =
      host.empty() || host.size() > 255 || host.find_first_of(" /[]@?#,") != std::string_view::npos;
  const auto port =
      colon == std::string_view::npos ? std::nullopt : ParseWhole(rest.substr(colon + 1));
  if (bad_host || !port || *port > 65535 || (*port == 0 && any_port == AnyPort::kForbidden)) {
    return Error(Code::kInvalidArgument,
                 "'" + std::string(text) + "' is no endpoint: write tcp://HOST:PORT");
  }
  return Endpoint{
      .host = std::string(host), .port = static_cast<uint16_t>(*port), .key = keyed.key};
}

Result<std::vector<Endpoint>> ParseEndpoints(std::string_view text) {
  std::vector<Endpoint> endpoints;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    KVRELAY_ASSIGN_OR_RETURN(Endpoint endpoint,
                             ParseEndpoint(Trim(text.substr(0, comma)), AnyPort::kForbidden));
    for (const Endpoint& other : endpoints) {
      if (other.ToString() == endpoint.ToString()) {
        return Error(Code::kInvalidArgument, endpoint.ToString() + " is named twice");
      }
    }
    endpoints.push_back(std::move(endpoint));
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return endpoints;
}

}  // namespace kvrelay::tools
