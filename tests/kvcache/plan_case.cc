#include "tests/kvcache/plan_case.h"

#include <algorithm>
#include <sstream>
#include <vector>

#include "kvcache/copy_host.h"
#include "kvcache/stream_chunks.h"
#include "tests/kvcache/plan_scene.h"

namespace kvrelay::testing_support {
namespace {

std::string Pull(PlanScene& scene, const PullSource& source, Cache& direct) {
  Cache& owner = scene.Owner(source.owner);
  const auto plan = PlanPull(owner.Side(), direct.Side(), source.head_begin, source.head_end,
                             scene.tokens(), source.head_group);
  if (!plan.has_value()) return "PlanPull: " + plan.error().ToString();
  if (const Status status = plan->Validate(owner.RegionBytes(), direct.RegionBytes());
      !status.ok()) {
    return status.ToString();
  }
  ExecuteCopy(*plan, owner.Bases<const std::byte>(), direct.Bases<std::byte>());
  return "";
}

std::string PullPacked(PlanScene& scene, const PullSource& source, Cache& packed) {
  Cache& owner = scene.Owner(source.owner);
  const uint64_t size = scene.numbers().chunk;
  const auto shapes = StreamsOf(owner.Side(), packed.Side(), source, scene.tokens());
  if (!shapes.has_value()) return "StreamsOf: " + shapes.error().ToString();
  for (const StreamShape& shape : *shapes) {
    const uint64_t chunk_bytes =
        std::max(shape.row_bytes(), shape.bytes() * size * size / 40 + size);
    const auto chunks = StreamChunks::Make(shape, chunk_bytes, StreamScales(shape, owner.Side()));
    if (!chunks.has_value()) return "StreamChunks: " + chunks.error().ToString();
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < chunks->count(); ++i) {
      std::vector<std::byte> chunk(chunks->bytes(i), kUntouched);
      bytes += chunk.size();
      const std::vector<uint64_t> chunk_size = {chunk.size()};
      const auto pack = chunks->PlanPack(owner.Side(), i);
      if (!pack.has_value()) return "PlanPack: " + pack.error().ToString();
      Status status = pack->Validate(owner.RegionBytes(), chunk_size);
      if (!status.ok()) return "pack: " + status.ToString();
      if (pack->bytes() != chunk.size()) return "pack: not the chunk's bytes";
      std::byte* const to_chunk[] = {chunk.data()};
      ExecuteCopy(*pack, owner.Bases<const std::byte>(), to_chunk);
      const auto unpack = chunks->PlanUnpack(packed.Side(), i);
      if (!unpack.has_value()) return "PlanUnpack: " + unpack.error().ToString();
      status = unpack->Validate(chunk_size, packed.RegionBytes());
      if (!status.ok()) return "unpack: " + status.ToString();
      const std::byte* const from_chunk[] = {chunk.data()};
      ExecuteCopy(*unpack, from_chunk, packed.Bases<std::byte>());
    }
    if (bytes != shape.bytes()) return "the chunks are not the stream";
  }
  return "";
}

}  // namespace

PlanCase PlanCase::Random(testing_support::Random& random) {
  PlanCase c;
#define KVRELAY_FIELD(name, most) c.name = static_cast<uint32_t>(random() % ((most) + 1));
  KVRELAY_PLAN_CASE_FIELDS(KVRELAY_FIELD)
#undef KVRELAY_FIELD
  return c;
}

PlanCase PlanCase::Parse(const std::string& line) {
  PlanCase c;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) continue;
    const auto value = static_cast<uint32_t>(std::strtoul(word.c_str() + equals + 1, nullptr, 10));
#define KVRELAY_FIELD(name, most) \
  if (word.compare(0, equals, #name) == 0) c.name = value;
    KVRELAY_PLAN_CASE_FIELDS(KVRELAY_FIELD)
#undef KVRELAY_FIELD
  }
  return c;
}

std::string PlanCase::ToString() const {
  std::string line;
#define KVRELAY_FIELD(name, most) \
  if (name != 0) line += (line.empty() ? "" : " ") + std::string(#name "=") + std::to_string(name);
  KVRELAY_PLAN_CASE_FIELDS(KVRELAY_FIELD)
#undef KVRELAY_FIELD
  return line;
}

std::string CheckPlanCase(const PlanCase& wanted) {
  PlanScene scene(wanted);
  const Cache untouched = scene.MakeReader();
  const Status valid = untouched.layout.Validate(untouched.RegionBytes());
  if (!valid.ok()) return valid.ToString();
  Cache direct = untouched;
  Cache packed = untouched;
  Cache expected = untouched;
  scene.WriteExpected(expected);
  const auto sources = AssignSources(scene.reader(), scene.owners());
  if (!sources.has_value()) return "AssignSources: " + sources.error().ToString();
  for (const PullSource& source : *sources) {
    if (std::string wrong = Pull(scene, source, direct); !wrong.empty()) return wrong;
    if (std::string wrong = PullPacked(scene, source, packed); !wrong.empty()) return wrong;
  }
  if (direct.regions != expected.regions) return "one-sided: wrong bytes";
  if (packed.regions != expected.regions) return "packed: wrong bytes";
  return "";
}

PlanCase ShrinkPlanCase(PlanCase failing) {
  const auto fields = [](PlanCase& c) {
    std::vector<uint32_t*> all;
#define KVRELAY_FIELD(name, most) all.push_back(&c.name);
    KVRELAY_PLAN_CASE_FIELDS(KVRELAY_FIELD)
#undef KVRELAY_FIELD
    return all;
  };
  for (bool smaller = true; smaller;) {
    smaller = false;
    for (size_t i = 0; i < fields(failing).size(); ++i) {
      const uint32_t value = *fields(failing)[i];
      for (const uint32_t less : {0U, 1U, value / 2, value - 1}) {
        if (less >= value) continue;
        PlanCase candidate = failing;
        *fields(candidate)[i] = less;
        if (CheckPlanCase(candidate).empty()) continue;
        failing = candidate;
        smaller = true;
        break;
      }
    }
  }
  return failing;
}

}  // namespace kvrelay::testing_support
