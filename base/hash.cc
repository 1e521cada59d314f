#include "base/hash.h"

#include <glog/logging.h>
#include <sodium.h>

#include <bit>
#include <cstring>

#include "base/random.h"

namespace kvrelay {

static_assert(std::endian::native == std::endian::little,
              "content hashes are of little-endian bytes");
static_assert(std::tuple_size_v<HashKey> == crypto_shorthash_KEYBYTES);

struct ContentHasher::State {
  crypto_generichash_state blake2b;
};

ContentHasher::ContentHasher(std::string_view domain) : state_(std::make_unique<State>()) {
  CHECK_LE(domain.size(), 255U);
  constexpr size_t kHashBytes = sizeof(ContentHash::bytes);
  static_assert(kHashBytes >= crypto_generichash_BYTES_MIN);
  crypto_generichash_init(&state_->blake2b, nullptr, 0, kHashBytes);
  // The domain goes first with its length, so that no domain and bytes together equal another pair.
  const auto length = static_cast<unsigned char>(domain.size());
  crypto_generichash_update(&state_->blake2b, &length, 1);
  Update(std::as_bytes(std::span(domain)));
}

ContentHasher::~ContentHasher() = default;

void ContentHasher::Update(std::span<const std::byte> bytes) {
  crypto_generichash_update(&state_->blake2b, reinterpret_cast<const unsigned char*>(bytes.data()),
                            bytes.size());
}

ContentHash ContentHasher::Peek() const {
  crypto_generichash_state until_now = state_->blake2b;
  ContentHash hash;
  crypto_generichash_final(&until_now, hash.bytes.data(), hash.bytes.size());
  return hash;
}

ContentHash ContentHasher::Finish() {
  ContentHash hash;
  crypto_generichash_final(&state_->blake2b, hash.bytes.data(), hash.bytes.size());
  return hash;
}

ContentHash HashBytes(std::span<const std::byte> bytes, std::string_view domain) {
  ContentHasher hasher(domain);
  hasher.Update(bytes);
  return hasher.Finish();
}

HashKey RandomHashKey() {
  HashKey key;
  RandomBytes(std::as_writable_bytes(std::span(key)));
  return key;
}

uint64_t KeyedHash(const HashKey& key, std::span<const std::byte> bytes) {
  uint64_t hash = 0;
  static_assert(sizeof(hash) == crypto_shorthash_BYTES);
  crypto_shorthash(reinterpret_cast<unsigned char*>(&hash),
                   reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), key.data());
  return hash;
}

}  // namespace kvrelay
