/* M2: claim, release, TTL, heartbeat, crash: when a lease of an owner engine with two ranks ends (sections 3 and 5).
 *
 * Owner engine: leader (rank 0) and rank 1, one block and one record each, so that every new lease reuses both. Reader
 * engines A and B; A may crash and come back (identities A1=1, A2=2, B=4: bits of the claim sets). Leases 1 and 2 are of
 * leader incarnation 1, lease 3 of incarnation 2.
 *
 * Network: a message once sent stays in a set of bits: it can be delivered at any later time, in any order, any number of
 * times; a reader's message can also be lost for good. Leader <-> rank messages are retried, so they are not lost for good,
 * but they are duplicated and reordered. Timers (TTL, missed heartbeats, absolute cap) may fire at ANY moment that they are
 * armed: what is proved holds for all durations. All steps but lost messages are monotonic, so every run ends, and
 * "eventually" is what holds when nothing more can happen (timeout).
 *
 * -D switches, each takes one rule away:
 *   NO_TOMB_REL  a RELEASE leaves no tombstone: a late or duplicate CLAIM makes the released claim again
 *   NO_ID_INC    claims and releases name the reader engine but not its incarnation
 *   NO_KEY_END   rank 1 ends what it has, whatever lease the message names
 *   NO_TOMB_RANK rank 1 forgets ended leases: a late START revives one
 *   NO_ACK       the leader counts rank 1's block as free when END is sent, not when it is acknowledged
 *   NO_HELLO     a restarted leader does not make rank 1 end the old incarnation's leases
 *   NO_RINC      START does not name rank 1's incarnation
 *   NO_RANKDOWN  the leader does not end leases when rank 1 restarts
 *   FREED_OK     a claim may name a rank that was freed as unread by an earlier claim
 *   LATE_CLAIM   a CLAIM is accepted after the lease ended
 *   NO_CAP       no absolute cap (heartbeats of a living reader renew for ever)
 *   NO_GUARD     the reader does not check the guard a second time
 *   NO_RDCRASH NO_LCRASH NO_RCRASH: smaller bounds (no crash of reader A, leader, rank 1)
 *   VACUITY      claims that no read is ever accepted (must FAIL)
 */
byte inc=1, rinc=1;             /* incarnations of leader and rank 1 */
byte lst[4];                    /* leader: 0 not yet, 1 offered, 2 claimed, 3 ending at rank 1, 4 ended */
byte claims[4], tomb[4], expd[4], reldel[4];
bool freed1[4], r1free=1;       /* leader's view of rank 1 */
byte own[2], rec[2], dat[2];    /* per rank: block's holder, record's live lease, whose data is in the block */
bool ended1[4];                 /* rank 1's tombstones */
byte mClaim[4], mNeed1[4], mRep[4], mRef[4], mRel[4];   /* reader <-> leader */
byte mStart[4]; bool mStartAck[4], mEnd[4], mEndAck[4]; /* leader <-> rank 1; mStart holds rank incarnation + 1 */
bool mHello, mHelloAck, downSeen;
byte rd[5], rst[5];             /* per reader identity: lease, state (0 idle 1 claiming 2 reading 3 done 4 crashed) */

#ifdef NO_ID_INC
#define ID(k) ((k)==2->1:(k))
#else
#define ID(k) (k)
#endif
#define LINC(L) ((L)==3->2:1)
#define ALIVE(L) (lst[L]==1||lst[L]==2)
#define NOTREADING(k,L) (!(rst[k]==2 && rd[k]==L) || (expd[L]&ID(k)))

/* leader ends a lease: own rank at once (M1 covers the order of stores), rank 1 by message */
inline EndLease(L) {
  assert(own[0]==L && rec[0]==L); rec[0]=0; own[0]=0; claims[L]=0; lst[L]=3; mEnd[L]=1;
#ifdef NO_ACK
  r1free=1;
#endif
}

#ifdef LATE_CLAIM
#define CLAIMABLE(L) (lst[L]!=0)
#else
#define CLAIMABLE(L) ALIVE(L)
#endif
#ifdef NO_TOMB_REL
#define TOMBED(L,k) 0
#else
#define TOMBED(L,k) (tomb[L]&ID(k))
#endif
#ifdef FREED_OK
#define RANKOK(L,k) 1
#else
#define RANKOK(L,k) (!(mNeed1[L]&(k)) || !freed1[L])
#endif

#define CLAIM(L,k) :: atomic { inc==LINC(L) && (mClaim[L]&(k)) && CLAIMABLE(L) && !TOMBED(L,k) && RANKOK(L,k) && \
    !(claims[L]&ID(k)) && (!(mNeed1[L]&(k)) || mStartAck[L]) -> \
    assert(ALIVE(L));                                   /* a late CLAIM is refused */ \
    assert(!(reldel[L]&ID(k)));                         /* a given-up claim never comes back */ \
    assert(!(mNeed1[L]&(k)) || !freed1[L]);             /* every rank that it names still holds the lease */ \
    claims[L]=claims[L]|ID(k); mRep[L]=mRep[L]|(k); lst[L]=2; expd[L]=expd[L]&(255-ID(k)); \
    if :: !(mNeed1[L]&(k)) && claims[L]==ID(k) && mStartAck[L] -> freed1[L]=1; mEnd[L]=1 :: skip fi } \
  :: atomic { (mClaim[L]&(k)) && !(mRef[L]&(k)) && (inc!=LINC(L) || (lst[L]!=0 && !ALIVE(L)) || TOMBED(L,k) || (ALIVE(L) && !RANKOK(L,k))) -> \
    mRef[L]=mRef[L]|(k) }
#define RELEASE(L,k) :: atomic { inc==LINC(L) && (mRel[L]&(k)) && ALIVE(L) && !((tomb[L]&ID(k)) && !(claims[L]&ID(k))) -> \
    tomb[L]=tomb[L]|ID(k); reldel[L]=reldel[L]|ID(k); \
    if :: (claims[L]|ID(k))==ID(k) -> /* no claim is left: the lease ends; nobody else's valid claim is lost */ \
         assert(NOTREADING(1,L) && NOTREADING(2,L) && NOTREADING(4,L)); EndLease(L) \
       :: else -> claims[L]=claims[L]&(255-ID(k)) fi }
/* the reader is silent: its claim expires (at any moment: heartbeats can be lost) */
#define EXPIRE(L,k) :: atomic { (claims[L]&ID(k)) && ALIVE(L) && EXPOK(k) -> expd[L]=expd[L]|ID(k); \
    if :: claims[L]==ID(k) -> EndLease(L) :: else -> claims[L]=claims[L]&(255-ID(k)) fi }
#ifdef NO_CAP
#define EXPOK(k) (rst[k]==4)    /* and then the heartbeat matters: a living engine renews */
#define CAP(L)
#else
#define EXPOK(k) 1
#define CAP(L) :: atomic { lst[L]==2 -> expd[L]=7; EndLease(L) }
#endif
#define TTL(L) :: atomic { lst[L]==1 -> EndLease(L) }   /* also: the owner cancels or fails the prefill */
#define ENDACK(L) :: atomic { lst[L]==3 && mEndAck[L] && inc==LINC(L) -> lst[L]=4; r1free=1 }

proctype Leader(byte me) {
end:
  do
  :: me!=inc -> break
  :: atomic { me==inc && inc==2 && mHelloAck && !r1free && lst[3]==0 -> r1free=1 }
  :: atomic { me==1 && inc==1 && lst[1]==0 && r1free -> own[0]=1; r1free=0; dat[0]=1; rec[0]=1; lst[1]=1; mStart[1]=rinc+1 }
  :: atomic { me==1 && inc==1 && lst[1]!=0 && lst[2]==0 && own[0]==0 && r1free -> own[0]=2; r1free=0; dat[0]=2 };
     atomic { if :: inc==1 -> rec[0]=2; lst[2]=1; mStart[2]=rinc+1 :: else fi }
  :: atomic { me==2 && inc==2 && lst[3]==0 && own[0]==0 && r1free -> own[0]=3; r1free=0; dat[0]=3; rec[0]=3; lst[3]=1; mStart[3]=rinc+1 }
#define ALL(L) CLAIM(L,1) CLAIM(L,2) CLAIM(L,4) RELEASE(L,1) RELEASE(L,2) RELEASE(L,4) EXPIRE(L,1) EXPIRE(L,2) EXPIRE(L,4) CAP(L) TTL(L) ENDACK(L)
  ALL(1) ALL(2) ALL(3)
#ifndef NO_RANKDOWN
#define DOWN(L) :: atomic { rinc==2 && ALIVE(L) && mStart[L]==2 && inc==LINC(L) -> expd[L]=7; EndLease(L) }
  DOWN(1) DOWN(2) DOWN(3)
#endif
  od
}

#ifdef NO_RINC
#define STARTOK(L) (mStart[L]!=0)
#else
#define STARTOK(L) (mStart[L]==rinc+1)
#endif
#ifdef NO_TOMB_RANK
#define DEAD1(L) (own[1]==L)
#else
#define DEAD1(L) ended1[L]
#endif
#define START(L) :: atomic { STARTOK(L) && !DEAD1(L) && own[1]!=L && !(mHelloAck && LINC(L)==1) -> \
    assert(own[1]==0); own[1]=L; dat[1]=L; \
    assert(!mEndAck[L]); } atomic { if :: own[1]==L -> rec[1]=L; mStartAck[L]=1 :: else fi }
#ifdef NO_KEY_END
#define SAME(L) (own[1]!=0)
#else
#define SAME(L) (own[1]==L)
#endif
#define END(L) :: atomic { mEnd[L] && (!mEndAck[L] || SAME(L)) -> ended1[L]=1; mEndAck[L]=1; \
    if :: SAME(L) -> assert(own[1]==L); rec[1]=0; own[1]=0 :: else fi }
active proctype Rank1() {
end:
  do
  START(1) START(2) START(3) END(1) END(2) END(3)
#ifndef NO_HELLO
  :: atomic { mHello && !mHelloAck -> mHelloAck=1; rec[1]=0; own[1]=0; ended1[1]=1; ended1[2]=1 }
#else
  :: atomic { mHello && !mHelloAck -> mHelloAck=1 }
#endif
  od
}

proctype Reader(byte k) {
  byte L, r, n; bool ok;
  if :: atomic { lst[1]!=0 -> L=1 } :: atomic { lst[2]!=0 -> L=2 } :: atomic { lst[3]!=0 -> L=3 } :: goto out fi;
  atomic { rd[k]=L; rst[k]=1; if :: mNeed1[L]=mNeed1[L]|k; n=2 :: n=1 fi; mClaim[L]=mClaim[L]|k }
  if
  :: atomic { mRep[L]&k -> rst[k]=2 };
     ok=1; r=0;
     do
     :: atomic { r<n -> if :: rec[r]!=L -> ok=0; break :: else fi };
        atomic { if :: dat[r]!=L -> ok=0 :: else fi };          /* ok now means: the data is right */
#ifndef NO_GUARD
        atomic { if :: rec[r]!=L -> ok=0; r=9; break :: else -> assert(ok); r++ fi }
#else
        atomic { assert(ok); r++ }
#endif
     :: atomic { r==n -> 
#ifdef VACUITY
          assert(n==1);
#endif
          break }
     :: break                                                   /* deadline or cancel in the middle */
     od
  :: mRef[L]&k -> goto out
  :: skip                                                       /* cancelled, or no answer: release all the same */
  fi;
out: atomic { if :: rst[k]!=4 -> rst[k]=3; mRel[L]=mRel[L]|k :: else fi; L=0; r=0; n=0; ok=0 }
}

/* A1 dies at any moment, A2 takes its place: modelled as A1 going silent (it may leave without a RELEASE by Lose) */
active proctype CrashA() {
#ifdef NO_RDCRASH
  false;
#endif
end: if :: skip; goto none :: skip fi; atomic { rst[1]==1 || rst[1]==2 || rst[1]==3 -> rst[1]=4; run Reader(2) };
none: skip
}
active proctype Lose() {
end: do
  :: atomic { mRel[1] -> mRel[1]=0 } :: atomic { mRel[2] -> mRel[2]=0 } :: atomic { mRel[3] -> mRel[3]=0 }
  :: break
  od
}
active proctype CrashLeader() {
#ifdef NO_LCRASH
  false;
#endif
end: if :: skip; goto none :: skip fi; atomic { lst[1]!=0 -> inc=2; rec[0]=0; own[0]=0; dat[0]=0; claims[1]=0; claims[2]=0; lst[1]=4; lst[2]=4;
    r1free=0; mHello=1; run Leader(2) };
none: skip
}
active proctype CrashRank() {
#ifdef NO_RCRASH
  false;
#endif
end: if :: skip; goto none :: skip fi; atomic { lst[1]!=0 -> rinc=2; rec[1]=0; own[1]=0; dat[1]=0; ended1[1]=0; ended1[2]=0; ended1[3]=0 };
none: skip
}
active proctype Monitor() {
  timeout -> assert(own[0]==0 && own[1]==0 && !ALIVE(1) && !ALIVE(2) && !ALIVE(3) && lst[1]!=3 && lst[2]!=3 && lst[3]!=3)
}
init { atomic { run Leader(1); run Reader(1); run Reader(4) } }
