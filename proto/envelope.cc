#include "proto/envelope.h"

#include <string>

#include "proto/limits.h"
#include "proto/pack.h"
#include "proto/parse.h"
#include "proto/unpack.h"

namespace kvrelay::proto {
namespace {

constexpr std::string_view kName = "envelope";
constexpr size_t kFields = 6;
constexpr uint64_t kLongestTypeName = 64;

// One field of the envelope, by `unpack(const msgpack::object&) -> Check`.
template <typename Unpack>
Status ReadField(const msgpack::object& map, std::string_view name, const Unpack& unpack) {
  const msgpack::object* value = nullptr;
  Check bad = FindKey(map, name, value);
  if (!bad) bad = unpack(*value);
  if (!bad) return Status::Ok();
  bad = std::move(*bad).Under(name);
  return {Code::kInvalidArgument, std::string(kName) + ": field '" + bad->path + "' " + bad->what};
}

template <typename T>
auto Into(T& to, uint64_t max = std::numeric_limits<T>::max()) {
  return [&to, max](const msgpack::object& from) { return UnpackValue(from, to, max); };
}

Status ReadVersion(const msgpack::object& map) {
  uint32_t major = 0;
  uint32_t minor = 0;
  KVRELAY_RETURN_IF_ERROR(ReadField(map, "v", [&](const msgpack::object& from) -> Check {
    if (from.type != msgpack::type::ARRAY || from.via.array.size != 2) {
      return Failure::Here("is not [major, minor]");
    }
    Check bad = UnpackValue(from.via.array.ptr[0], major, UINT32_MAX);
    return bad ? bad : UnpackValue(from.via.array.ptr[1], minor, UINT32_MAX);
  }));
  if (major == kVersionMajor) return Status::Ok();
  return {Code::kIncompatible, "the peer speaks protocol " + std::to_string(major) + "." +
                                   std::to_string(minor) + ", we speak " + VersionText()};
}

Status ReadText(const msgpack::object& map, std::string_view name, std::string_view& to,
                bool opaque) {
  return ReadField(map, name, [&](const msgpack::object& from) -> Check {
    if (opaque && from.type == msgpack::type::BIN) {
      to = {from.via.bin.ptr, from.via.bin.size};
    } else if (!opaque && from.type == msgpack::type::STR) {
      to = View(from);
    } else {
      return Failure::Here(opaque ? "is not binary" : "is not a string");
    }
    return {};
  });
}

}  // namespace

std::string VersionText() {
  return std::to_string(kVersionMajor) + "." + std::to_string(kVersionMinor);
}

std::string EncodeEnvelope(const Envelope& envelope) {
  StringSink sink;
  sink.bytes.reserve(envelope.body.size() + 64);
  Packer out(sink);
  out.pack_map(kFields);
  PackText(out, "v");
  out.pack_array(2);
  out.pack(kVersionMajor);
  out.pack(kVersionMinor);
  PackText(out, "t");
  PackText(out, TypeName(envelope.type));
  PackText(out, "id");
  out.pack(envelope.id);
  PackText(out, "more");
  out.pack(envelope.more);
  PackText(out, "timeout_ms");
  out.pack(envelope.timeout_ms);
  PackText(out, "b");
  PackBytes(out, envelope.body.data(), envelope.body.size());
  return std::move(sink.bytes);
}

tl::expected<Envelope, BadEnvelope> DecodeEnvelope(std::string_view bytes) {
  Envelope envelope;
  const auto bad = [&](Status status, std::string_view reason) {
    return tl::unexpected(BadEnvelope{std::move(status), reason, envelope.id});
  };

  ParsedMap parsed;
  if (Status status = ParseMap(kName, bytes, kMaxMessageBytes, parsed); !status.ok()) {
    const bool large = status.code() == Code::kTooLarge;
    return bad(std::move(status), large ? "size" : "malformed");
  }
  const msgpack::object& map = parsed.root;
  if (Status s = ReadField(map, "id", Into(envelope.id)); !s.ok()) return bad(s, "malformed");
  if (envelope.id == 0) {
    return bad({Code::kInvalidArgument, "envelope: field 'id' is 0"}, "malformed");
  }
  if (Status s = ReadVersion(map); !s.ok()) {
    return bad(s, s.code() == Code::kIncompatible ? "version" : "malformed");
  }
  std::string_view type_name;
  for (const Status& s :
       {ReadText(map, "t", type_name, false), ReadField(map, "more", Into(envelope.more)),
        ReadField(map, "timeout_ms", Into(envelope.timeout_ms)),
        ReadText(map, "b", envelope.body, true)}) {
    if (!s.ok()) return bad(s, "malformed");
  }
  const std::optional<Type> type = TypeFromName(type_name);
  if (!type) {
    return bad(
        {Code::kInvalidArgument, "envelope: unknown message type '" +
                                     std::string(type_name.substr(0, kLongestTypeName)) + "'"},
        "type");
  }
  envelope.type = *type;
  return envelope;
}

}  // namespace kvrelay::proto
