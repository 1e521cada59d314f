#include "proto/parse.h"

#include <exception>
#include <string>

#include "proto/limits.h"

namespace kvrelay::proto {
namespace {

// Looks at every header of a message and keeps nothing. A visit that returns false ends the parse.
class LimitVisitor : public msgpack::null_visitor {
 public:
  explicit LimitVisitor(size_t bytes) : bytes_(bytes) {}

  bool start_array(uint32_t elements) { return Enter(elements); }
  bool end_array() { return Leave(); }
  bool start_map(uint32_t pairs) {
    if (pairs > kMaxMapFields) {
      return Fail("a map of " + std::to_string(pairs) + " fields, more than " +
                  std::to_string(kMaxMapFields));
    }
    return Enter(uint64_t{2} * pairs);
  }
  bool end_map() { return Leave(); }
  void parse_error(size_t, size_t offset) { Fail("not msgpack at byte " + std::to_string(offset)); }
  void insufficient_bytes(size_t, size_t) { Fail("truncated"); }

  const std::string& error() const { return error_; }

 private:
  bool Enter(uint64_t values) {
    objects_ += values;
    // Each value is one byte at least, so no honest message declares more values than it has bytes.
    if (objects_ > bytes_) return Fail("truncated");
    if (objects_ > kMaxObjects) {
      return Fail("more than " + std::to_string(kMaxObjects) + " values");
    }
    if (++depth_ > kMaxNesting) {
      return Fail("nested deeper than " + std::to_string(kMaxNesting));
    }
    return true;
  }
  bool Leave() {
    --depth_;
    return true;
  }
  bool Fail(std::string why) {
    if (error_.empty()) error_ = std::move(why);
    return false;
  }

  const size_t bytes_;
  uint64_t objects_ = 0;
  uint32_t depth_ = 0;
  std::string error_;
};

bool ReferToInput(msgpack::type::object_type, size_t, void*) { return true; }

Status Malformed(std::string_view name, const std::string& why) {
  return {Code::kInvalidArgument, std::string(name) + ": " + why};
}

}  // namespace

Status ParseMap(std::string_view name, std::string_view bytes, uint64_t max_bytes, ParsedMap& out) {
  if (bytes.size() > max_bytes) {
    return {Code::kTooLarge, std::string(name) + ": " + std::to_string(bytes.size()) +
                                 " bytes, more than " + std::to_string(max_bytes)};
  }
  if (bytes.empty()) return Malformed(name, "truncated");
  try {
    LimitVisitor limits(bytes.size());
    size_t offset = 0;
    if (!msgpack::parse(bytes.data(), bytes.size(), offset, limits)) {
      return Malformed(name, limits.error().empty() ? "not msgpack" : limits.error());
    }
    if (offset != bytes.size()) {
      return Malformed(name, std::to_string(bytes.size() - offset) + " bytes after its end");
    }
    out.root = msgpack::unpack(out.zone, bytes.data(), bytes.size(), &ReferToInput);
  } catch (const std::exception& e) {  // msgpack throws on malformed input
    return Malformed(name, e.what());
  }
  if (out.root.type != msgpack::type::MAP) return Malformed(name, "not a map");
  return Status::Ok();
}

}  // namespace kvrelay::proto
