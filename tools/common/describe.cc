#include "tools/common/describe.h"

#include <nlohmann/json.hpp>

namespace kvrelay::tools {
namespace {

using Json = nlohmann::ordered_json;

// Visits every member of a struct with its key. One list serves both directions.
template <typename Visitor>
void Visit(Visitor& v, Description::Engine& x) {
  v("engine_id", x.engine_id);
  v("incarnation", x.incarnation);
  v("role", x.role);
  v("endpoint", x.endpoint);
  v("version", x.version);
  v("protocol", x.protocol);
  v("model_fingerprint", x.model_fingerprint);
  v("model_name", x.model_name);
  v("tp", x.tp);
  v("pp", x.pp);
  v("pid", x.pid);
  v("uptime_ms", x.uptime_ms);
  v("ready", x.ready);
  v("draining", x.draining);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Flag& x) {
  v("name", x.name);
  v("value", x.value);
  v("source", x.source);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Layout& x) {
  v("format", x.format);
  v("dtype", x.dtype);
  v("layers", x.layers);
  v("kv_heads", x.kv_heads);
  v("head_dim", x.head_dim);
  v("block_size", x.block_size);
  v("num_blocks", x.num_blocks);
  v("block_stride_bytes", x.block_stride_bytes);
  v("head_stride_bytes", x.head_stride_bytes);
  v("token_stride_bytes", x.token_stride_bytes);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Shard& x) {
  v("rank", x.rank);
  v("tp", x.tp);
  v("layer_begin", x.layer_begin);
  v("layer_end", x.layer_end);
  v("total_layers", x.total_layers);
  v("head_begin", x.head_begin);
  v("head_end", x.head_end);
  v("total_heads", x.total_heads);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Region& x) {
  v("rank", x.rank);
  v("id", x.id);
  v("device", x.device);
  v("bytes", x.bytes);
  v("exported", x.exported);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Blocks& x) {
  v("total", x.total);
  v("used", x.used);
  v("free", x.free);
  v("quarantine", x.quarantine);
  v("kept", x.kept);
  v("shared", x.shared);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Lease& x) {
  v("id", x.id);
  v("epoch", x.epoch);
  v("state", x.state);
  v("kind", x.kind);
  v("tokens", x.tokens);
  v("blocks", x.blocks);
  v("readers", x.readers);
  v("time_left_ms", x.time_left_ms);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Session& x) {
  v("rank", x.rank);
  v("number", x.number);
  v("state", x.state);
  v("peer", x.peer);
  v("tokens", x.tokens);
  v("blocks", x.blocks);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Peer& x) {
  v("own_rank", x.own_rank);
  v("engine_id", x.engine_id);
  v("incarnation", x.incarnation);
  v("rank", x.rank);
  v("endpoint", x.endpoint);
  v("state", x.state);
  v("path", x.path);
  v("why", x.why);
  v("rtt_ms", x.rtt_ms);
}
template <typename Visitor>
void Visit(Visitor& v, Description::Prefix& x) {
  v("hash", x.hash);
  v("tokens", x.tokens);
  v("bytes", x.bytes);
  v("references", x.references);
  v("hits", x.hits);
}
template <typename Visitor>
void Visit(Visitor& v, Description::PrefillWorker& x) {
  v("endpoint", x.endpoint);
  v("state", x.state);
  v("why", x.why);
  v("outstanding_tokens", x.outstanding_tokens);
  v("failures", x.failures);
}
template <typename Visitor>
void Visit(Visitor& v, Description& x) {
  v("engine", x.engine);
  v("flags", x.flags);
  v("layout", x.layout);
  v("shards", x.shards);
  v("transports", x.transports);
  v("regions", x.regions);
  v("blocks", x.blocks);
  v("leases", x.leases);
  v("sessions", x.sessions);
  v("peers", x.peers);
  v("prefixes", x.prefixes);
  v("prefill_workers", x.prefill_workers);
  v("counters", x.counters);
}

struct Writer {
  template <typename T>
  static Json ToJson(T& value) {
    if constexpr (requires(Writer w, T & x) { Visit(w, x); }) {
      Writer inner;
      Visit(inner, value);
      return std::move(inner.json);
    } else {
      return value;
    }
  }
  template <typename T>
  static Json ToJson(std::vector<T>& values) {
    Json list = Json::array();
    for (T& value : values) list.push_back(ToJson(value));
    return list;
  }
  template <typename T>
  void operator()(const char* key, T& value) {
    json[key] = ToJson(value);
  }
  Json json = Json::object();
};

struct Reader {
  template <typename T>
  static void FromJson(const Json& json, T& value) {
    if constexpr (requires(Reader r, T & x) { Visit(r, x); }) {
      Reader inner{json};
      Visit(inner, value);
    } else {
      json.get_to(value);
    }
  }
  template <typename T>
  static void FromJson(const Json& json, std::vector<T>& values) {
    if (!json.is_array()) throw std::invalid_argument("is no list");
    for (const Json& element : json) FromJson(element, values.emplace_back());
  }
  template <typename T>
  void operator()(const char* key, T& value) {
    if (!json.is_object()) throw std::invalid_argument("is no object");
    const auto it = json.find(key);
    if (it == json.end()) return;
    try {
      FromJson(*it, value);
    } catch (const std::exception& e) {
      throw std::invalid_argument(std::string(key) + ": " + e.what());
    }
  }
  const Json& json;
};

}  // namespace

std::string DescriptionToJson(const Description& description) {
  Json json = {{"schema", 1}};
  Description copy = description;
  json.update(Writer::ToJson(copy));
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<Description> DescriptionFromJson(std::string_view json) {
  try {
    Description description;
    Reader::FromJson(Json::parse(json), description);
    return description;
  } catch (const std::exception& e) {
    return Error(Code::kInvalidArgument, std::string("description of the engine: ") + e.what());
  }
}

}  // namespace kvrelay::tools
