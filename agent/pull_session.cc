#include "agent/pull_session.h"

#include <algorithm>
#include <utility>

#include "agent/follow.h"
#include "proto/codec.h"

namespace kvrelay::agent {
namespace {

// Of a stream: what has been computed of a prompt goes in pieces of this many tokens. Short enough
// that little is left to send when the prompt is done, long enough that a chunk is not slivers.
constexpr uint32_t kSegmentTokens = 128;
constexpr RetryPolicy kReadPolicy{.tries = 3, .per_try = Millis(1000), .pause = Millis(10)};

}  // namespace

PullSession::PullSession(Env& env, PeerTable& peers, const RankIdentity& identity,
                         Quarantine& quarantine, PackedWindow& window, uint64_t chunk_bytes,
                         proto::Pull pull, Events events)
    : env_(env),
      peers_(peers),
      identity_(identity),
      quarantine_(quarantine),
      window_(window),
      chunk_bytes_(chunk_bytes),
      pull_(std::move(pull)),
      events_(std::move(events)),
      scales_(identity.layout, identity.shard) {}

void PullSession::Start() {
  started_ = env_.clock.Now();
  deadline_ = started_ + Millis(pull_.timeout_ms);
  timer_ = env_.clock.CallAt(deadline_, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) {
      self->Cancel({Code::kDeadlineExceeded, "the pull from " + self->pull_.peer_front +
                                                 " took more than " +
                                                 std::to_string(self->pull_.timeout_ms) + " ms"});
    }
  });
  std::vector<KvShard> owners;
  for (const proto::ClaimRank& rank : pull_.claim.ranks) owners.push_back(rank.shard);
  const auto sources = AssignSources(identity_.shard, owners);
  if (!sources.has_value()) {
    env_.clock.CallAfter({}, [self = shared_from_this(), status = sources.error()] {
      self->Cancel(status.Wrap(self->env_.owner_role + " " + self->pull_.peer_front));
    });
    return;
  }
  handshakes_left_ = sources->size();
  for (const PullSource& source : *sources) {
    const proto::ClaimRank& rank = pull_.claim.ranks[source.owner];
    peers_.Get(
        rank.endpoint, rank.rank, rank.incarnation,
        [weak = weak_from_this(), source](const Result<std::shared_ptr<const ReadyPeer>>& peer) {
          if (const auto self = weak.lock()) self->OnPeer(source, peer);
        });
  }
}

const char* PullSession::state() const {
  if (drained_) return "drained";
  if (failed_) return "draining";
  return handshakes_left_ > 0 ? "handshaking" : "reading";
}

void PullSession::OnPeer(const PullSource& source,
                         const Result<std::shared_ptr<const ReadyPeer>>& peer) {
  if (finished_) return;
  if (!peer.has_value()) return Fail(peer.error());
  if (--handshakes_left_ == 0) handshake_ms_ = ToMillis(env_.clock.Now() - started_);
  if (Status status = StartSource(source, *peer); !status.ok()) {
    return Fail(status.Wrap(Context(pull_.claim.ranks[source.owner])));
  }
  window_.Admit();
  FinishIfDone();  // windows may leave nothing to read
  DrainIfIdle();
}

std::string PullSession::Context(const proto::ClaimRank& rank) const {
  return env_.owner_role + " " + rank.endpoint + " rank " + std::to_string(rank.rank);
}

OwnedSide PullSession::OwnerSide(const ReadyPeer& peer, const proto::ClaimRank& rank) const {
  return {peer.meta.layout, peer.meta.shard, pull_.claim.tables, rank.scales};
}

OwnedSide PullSession::ReaderSide() const {
  return {identity_.layout, identity_.shard, pull_.own_tables, scales_.scales()};
}

Status PullSession::StartSource(const PullSource& source,
                                const std::shared_ptr<const ReadyPeer>& peer) {
  // What cannot be planned is refused before anything moves.
  KVRELAY_ASSIGN_OR_RETURN(const SourcePlan plan,
                           PlanSource(pull_, identity_, source, *peer, scales_));
  KVRELAY_ASSIGN_OR_RETURN(const ReadyPeer::Path path, ChoosePath(*peer, plan.whole));
  path_ = path.transport->name();
  cast_ = cast_ || plan.whole.casts();
  return path.transport->style() == transport::Style::kOneSided
             ? StartOneSided(source, *peer, path, plan)
             : StartPacked(source, peer, path, plan.want);
}

Result<ReadyPeer::Path> PullSession::ChoosePath(const ReadyPeer& peer,
                                                const CopyPlan& whole) const {
  using Fit = transport::Fitness::Fit;
  const ReadyPeer::Path* best = nullptr;
  Fit best_fit = Fit::kNo;
  std::string why;
  for (const ReadyPeer::Path& path : peer.paths) {
    const transport::Transport& transport = *path.transport;
    const auto add_reason = [&](const std::string& reason) {
      why += (why.empty() ? "" : "; ") + std::string(transport.name()) + ": " + reason;
    };
    const transport::Fitness fitness = transport.FitnessFor(whole);
    if (fitness.fit == Fit::kNo) {
      add_reason(fitness.why);
    } else if (transport.lingers() && whole.bytes() > quarantine_.free()) {
      add_reason("no room in quarantine for " + std::to_string(whole.bytes()) + " bytes, " +
                 std::to_string(quarantine_.free()) + " are free");
    } else if (best == nullptr || fitness.fit > best_fit) {
      best = &path;
      best_fit = fitness.fit;
    }
  }
  if (best == nullptr) return Error(Code::kRefused, "no path moves this pull (" + why + ")");
  return *best;
}

PullSession::Part& PullSession::AddPart(const proto::ClaimRank& rank,
                                        transport::Transport* transport, uint64_t bytes,
                                        const GuardExpectation& want) {
  ++ops_in_flight_;
  return parts_.emplace_back(Part{.rank = rank,
                                  .bytes = bytes,
                                  .reserved = 0,
                                  .transport = transport,
                                  .op = 0,
                                  .stream = 0,
                                  .piece = 0,
                                  .want = want,
                                  .request = nullptr});
}

Status PullSession::StartOneSided(const PullSource& source, const ReadyPeer& peer,
                                  const ReadyPeer::Path& path, const SourcePlan& plan) {
  Part& part =
      AddPart(pull_.claim.ranks[source.owner], path.transport, plan.whole.src_bytes(), plan.want);
  if (path.transport->lingers()) {
    part.reserved = plan.whole.bytes();
    quarantine_.Reserve(part.reserved);
  }
  // What is computed and small is here sooner than another thread would be awake.
  if (auto now = path.transport->ReadNow(path.handle, plan.whole, plan.guard);
      now && (!now->status.ok() || GuardHolds(plan.want, now->before, now->after))) {
    env_.clock.CallAfter({}, [done = OnDone(part), now = *std::move(now)] { done(now); });
    return Status::Ok();
  }
  part.op = path.transport->Read(
      path.handle,
      Follow(OwnerSide(peer, part.rank), ReaderSide(), source, pull_.tokens, plan.want), plan.guard,
      terms(), OnDone(part));
  return Status::Ok();
}

// A stream for each kind of layers, each at the pace of the prompt's computation, in pieces where
// what may be asked for is bounded.
Status PullSession::StartPacked(const PullSource& source,
                                const std::shared_ptr<const ReadyPeer>& peer,
                                const ReadyPeer::Path& path, const GuardExpectation& want) {
  const proto::ClaimRank& rank = pull_.claim.ranks[source.owner];
  const OwnedSide owner = OwnerSide(*peer, rank);
  const OwnedSide reader = ReaderSide();
  // A table that does not cover the range is refused before the owner is asked.
  KVRELAY_ASSIGN_OR_RETURN(std::vector<StreamShape> shapes,
                           StreamsOf(owner.view(), reader.view(), source, pull_.tokens));
  for (StreamShape& shape : shapes) {
    const uint32_t page = std::max(1U, shape.page_tokens);
    shape.segment_tokens = (kSegmentTokens + page - 1) / page * page;
    for (StreamShape& piece : CutStream(shape, window_.PieceBytes(chunk_bytes_))) {
      const uint64_t bytes = piece.bytes();
      const PackedWindow::Id id = window_.Enter(
          pull_.priority, bytes, [weak = weak_from_this()](PackedWindow::Id admitted) {
            if (const auto self = weak.lock()) self->OnRoom(admitted);
          });
      pieces_.emplace(id, Piece{rank, peer, path, std::move(piece), want});
    }
  }
  return Status::Ok();
}

void PullSession::OnRoom(PackedWindow::Id id) {
  const auto node = pieces_.extract(id);
  if (Status status = StartStream(id, node.mapped()); !status.ok()) {
    window_.Leave(id);
    Fail(status.Wrap(Context(node.mapped().rank)));
  }
}

Status PullSession::StartStream(PackedWindow::Id id, const Piece& piece) {
  const auto& [rank, ready, path, shape, want] = piece;
  const ReadyPeer& peer = *ready;
  KVRELAY_ASSIGN_OR_RETURN(
      StreamChunks chunks,
      StreamChunks::Make(shape, chunk_bytes_, StreamScales(shape, OwnerSide(peer, rank).view())));
  struct Target {
    OwnedSide side;
    StreamChunks chunks;
  };
  const auto target = std::make_shared<const Target>(Target{ReaderSide(), std::move(chunks)});
  transport::StreamPlan plan{
      .chunks = target->chunks.count(),
      .max_chunk_bytes = chunk_bytes_,
      .plan_chunk =
          [target](uint32_t chunk) {
            return target->chunks.PlanUnpack(target->side.view(), chunk);
          },
      .extent_of = [target, first = peer.meta.shard.layer_begin](
                       uint32_t chunk) { return target->chunks.ExtentOf(chunk, first); }};
  Part& part = AddPart(rank, path.transport, shape.bytes(), want);
  part.piece = id;
  part.stream = env_.random();
  part.op = path.transport->StartPackedReceive(path.handle, part.stream, std::move(plan), want,
                                               terms(), OnDone(part));
  const proto::PackedRead request{.reader = identity_.engine,
                                  .reader_incarnation = identity_.incarnation,
                                  .owner_incarnation = rank.incarnation,
                                  .lease = pull_.lease,
                                  .epoch = rank.epoch,
                                  .shape = shape,
                                  .stream = part.stream,
                                  .chunk_bytes = chunk_bytes_,
                                  .transport = std::string(path.transport->name()),
                                  .address = path.transport->LocalAddress(),
                                  .priority = pull_.priority,
                                  .timeout_ms = static_cast<uint32_t>(
                                      std::max<double>(1, ToMillis(deadline_ - env_.clock.Now())))};
  part.request = std::make_unique<RetryingCall>(
      env_.rpc, env_.clock, Context(rank), rank.endpoint, proto::Type::kPackedRead,
      proto::Encode(request), kReadPolicy, deadline_,
      [weak = weak_from_this()](const Result<std::string>& reply) {
        const auto self = weak.lock();
        if (!self || self->finished_ || reply.has_value()) return;
        self->Fail(reply.error());
      });
  return Status::Ok();
}

transport::Done PullSession::OnDone(Part& part) {
  return [self = shared_from_this(), &part](const transport::Completion& completion) {
    self->OnPartDone(part, completion);
  };
}

void PullSession::OnPartDone(Part& part, const transport::Completion& completion) {
  --ops_in_flight_;
  part.op = 0;
  quarantine_.Return(std::exchange(part.reserved, 0));
  part.request.reset();
  if (!finished_) {
    Status status = completion.status;
    // Of a packed stream the transport has checked the guard around each chunk.
    const bool checked = part.stream != 0;
    if (status.ok() && !checked && !GuardHolds(part.want, completion.before, completion.after)) {
      status = {Code::kStaleRead,
                "the lease changed while it was read; the bytes were thrown away"};
    }
    if (status.code() == Code::kStaleRead) {
      env_.counters.Add("kvrelay_stale_reads_prevented_total");
    }
    if (!status.ok()) {
      if (status.code() == Code::kPeerUnreachable) peers_.Forget(part.rank.endpoint);
      Fail(status.Wrap(Context(part.rank)));
    }
  }
  window_.Leave(part.piece);
  window_.Admit();
  FinishIfDone();
  DrainIfIdle();
}

void PullSession::FinishIfDone() {
  if (finished_ || handshakes_left_ > 0 || ops_in_flight_ > 0 || !pieces_.empty()) return;
  finished_ = true;
  env_.clock.Cancel(timer_);
  proto::PullReply reply{.path = path_,
                         .bytes = 0,
                         .handshake_ms = handshake_ms_,
                         .copy_ms = 0,
                         .scales = scales_.scales(),
                         .cast = cast_};
  for (const Part& part : parts_) reply.bytes += part.bytes;
  reply.copy_ms = ToMillis(env_.clock.Now() - started_) - handshake_ms_;
  env_.counters.Add("kvrelay_pulls_total{path=\"" + path_ + "\",outcome=\"ok\"}");
  events_.finished(reply);
}

void PullSession::Cancel(const Status& why) {
  if (!finished_) Fail(why);
}

void PullSession::Fail(const Status& status) {
  finished_ = true;
  failed_ = true;
  env_.clock.Cancel(timer_);
  env_.counters.Add("kvrelay_pulls_total{path=\"" + (path_.empty() ? "none" : path_) +
                    "\",outcome=\"" + std::string(CodeName(status.code())) + "\"}");
  for (const auto& [id, piece] : std::exchange(pieces_, {})) window_.Leave(id);
  window_.Admit();
  for (Part& part : parts_) {
    part.request.reset();
    if (part.op == 0) continue;
    if (part.stream != 0) {
      env_.rpc.Call(part.rank.endpoint, proto::Type::kPackedCancel,
                    proto::Encode(proto::PackedCancel{.reader = identity_.engine,
                                                      .reader_incarnation = identity_.incarnation,
                                                      .stream = part.stream}),
                    env_.clock.Now() + Millis(1000), [](const Result<std::string>&, bool) {});
    }
    part.transport->Cancel(part.op);
  }
  events_.finished(Error(status));
  // Not from inside the call that failed us: whoever started it is still looking at us.
  env_.clock.CallAfter({}, [self = shared_from_this()] { self->DrainIfIdle(); });
}

void PullSession::DrainIfIdle() {
  if (!finished_ || drained_ || ops_in_flight_ > 0) return;
  drained_ = true;
  events_.drained();
}

}  // namespace kvrelay::agent
