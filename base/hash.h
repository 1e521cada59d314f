// Names for content, and tags that only a key's holder can make (libsodium). Any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <type_traits>

#include "base/ids.h"

namespace kvrelay {

// BLAKE2b-128 of `bytes`. The domain ("prompt", "model"; at most 255 characters) keeps equal bytes
// of different meaning apart. The value is part of the protocol: both sides must compute the same.
ContentHash HashBytes(std::span<const std::byte> bytes, std::string_view domain = {});

// The same in pieces: equal to HashBytes of all pieces joined (boundaries do not count; callers
// prefix lengths where they must). Finish() ends it.
class ContentHasher {
 public:
  explicit ContentHasher(std::string_view domain = {});
  ~ContentHasher();
  ContentHasher(const ContentHasher&) = delete;
  ContentHasher& operator=(const ContentHasher&) = delete;

  void Update(std::span<const std::byte> bytes);
  // The bytes of a little-endian array, for example of token ids.
  template <typename T, size_t kExtent>
  requires std::is_integral_v<std::remove_cv_t<T>>
  void UpdateInts(std::span<T, kExtent> values) { Update(std::as_bytes(values)); }
  // Of what has come until now; more may follow.
  ContentHash Peek() const;
  ContentHash Finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A secret for KeyedHash; one per incarnation.
using HashKey = std::array<uint8_t, 16>;
HashKey RandomHashKey();

// SipHash-2-4: without the key nobody can find bytes with a given value. Fast on short input.
uint64_t KeyedHash(const HashKey& key, std::span<const std::byte> bytes);

}  // namespace kvrelay
