// Keys of CURVE (Curve25519, as ZeroMQ uses it), and where a server is reached that has one.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "base/status.h"

namespace kvrelay::transport {

using CurveKey = std::array<uint8_t, 32>;

// 43 characters of base64url, fit for shells and files.
std::string KeyToText(const CurveKey& key);
// kInvalidArgument for anything else.
Result<CurveKey> KeyFromText(std::string_view text);

// Who a process is to its peers, and which peers it talks to.
struct CurveIdentity {
  CurveKey public_key{};
  CurveKey secret_key{};
  std::set<CurveKey> allowed;  // public keys, beside our own
  bool anybody = false;        // no key is refused: what is sent is secret, not who sends it

  bool Allows(const CurveKey& key) const {
    return anybody || key == public_key || allowed.contains(key);
  }
};

// The key pair that a secret key belongs to; allows nobody else.
CurveIdentity IdentityOf(const CurveKey& secret_key);
// A new key pair; allows nobody else.
CurveIdentity NewCurveIdentity();

// "tcp://10.0.0.7:7600#KEY": the server there has this public key. Without "#KEY": it has none.
struct KeyedEndpoint {
  std::string endpoint;
  std::optional<CurveKey> key;

  std::string ToText() const;
  // kInvalidArgument for a key that is none. The endpoint is not looked at.
  static Result<KeyedEndpoint> FromText(std::string_view text);
};

}  // namespace kvrelay::transport
