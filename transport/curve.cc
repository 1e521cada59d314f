#include "transport/curve.h"

#include <sodium.h>

#include "base/random.h"

namespace kvrelay::transport {
namespace {

constexpr int kVariant = sodium_base64_VARIANT_URLSAFE_NO_PADDING;
constexpr size_t kTextBytes = sodium_base64_ENCODED_LEN(sizeof(CurveKey), kVariant);  // with the 0

}  // namespace

std::string KeyToText(const CurveKey& key) {
  char text[kTextBytes];
  sodium_bin2base64(text, sizeof(text), key.data(), key.size(), kVariant);
  return text;
}

Result<CurveKey> KeyFromText(std::string_view text) {
  CurveKey key;
  size_t bytes = 0;
  if (text.size() != kTextBytes - 1 ||
      sodium_base642bin(key.data(), key.size(), text.data(), text.size(), nullptr, &bytes, nullptr,
                        kVariant) != 0 ||
      bytes != key.size()) {
    return Error(Code::kInvalidArgument, "'" + std::string(text.substr(0, 64)) +
                                             "' is not a public key: 43 characters of A-Z, a-z, "
                                             "0-9, '-' and '_'");
  }
  return key;
}

CurveIdentity IdentityOf(const CurveKey& secret_key) {
  CurveIdentity identity;
  identity.secret_key = secret_key;
  crypto_scalarmult_base(identity.public_key.data(), identity.secret_key.data());
  return identity;
}

CurveIdentity NewCurveIdentity() {
  CurveKey secret_key;
  RandomBytes(std::as_writable_bytes(std::span(secret_key)));
  return IdentityOf(secret_key);
}

std::string KeyedEndpoint::ToText() const {
  return key.has_value() ? endpoint + '#' + KeyToText(*key) : endpoint;
}

Result<KeyedEndpoint> KeyedEndpoint::FromText(std::string_view text) {
  const size_t hash = text.find('#');
  KeyedEndpoint keyed{.endpoint = std::string(text.substr(0, hash)), .key = std::nullopt};
  if (hash != std::string_view::npos) {
    KVRELAY_ASSIGN_OR_RETURN(keyed.key, KeyFromText(text.substr(hash + 1)));
  }
  return keyed;
}

}  // namespace kvrelay::transport
