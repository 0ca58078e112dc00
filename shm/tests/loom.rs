//! Every interleaving, and every value that a weak memory model lets a load return, of the small cases.
//!
//! Run by `ci/loom.sh`; `ci/mutants.sh` weakens each ordering in turn and expects a model here to fail.
//! Published words of ring entries are race-checked cells (`sync.rs`), so an access that the sequence or
//! the position does not order fails by itself. A lost wake is a deadlock, which loom reports.
//! Threads are the model's own; the sleeping place is a model of FUTEX_WAIT: the word is compared under the
//! lock that FUTEX_WAKE takes.
//!
//! Bounds: a model without a bound on preemptions is complete. Where the server sleeps more than once the
//! bound is 3: beyond it loom 0.7.3 reports executions that no memory model allows. It orders the stores of
//! one word only as far as it has to and does not know that an exchange comes *directly* after the store
//! whose value it took; so a client may "see" the 0 that it put there itself instead of the server's later
//! mark, across both fences. The models with a single wake have no such pair and are complete.
#![cfg(loom)]
#![allow(unsafe_code)]

use doorbell_shm::bell::{
    ASLEEP, ASLEEP_WANTS_SPACE, ClientBell, Published, ServerBell, WAITER_FUTEX, WAITER_SOCKET,
    fence_before_bell,
};
use doorbell_shm::lane::{BULK, Drain, INTERACTIVE};
use doorbell_shm::lease::LeaseWords;
use doorbell_shm::pipe::{Pipe, PipeReader, PipeWriter, Range as PipeRange, ReadySet, Store};
use doorbell_shm::ring::{Consumer, Entry, Producer};
use doorbell_shm::slots::{Hints, ServerWord};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// Words of an entry: the sequence and one that it publishes.
const W: usize = 2;
type Entries = std::sync::Arc<[Entry<W>]>;
type Tx = Producer<Entries, Arc<AtomicU32>, W>;
type Rx = Consumer<Entries, Arc<AtomicU32>, W>;

/// Both ends of a ring of `n` entries.
fn ring(n: usize) -> (Tx, Rx) {
    let entries: Entries = (0..n).map(|_| Entry::new()).collect();
    let position = Arc::new(AtomicU32::new(0));
    (Producer::new(entries.clone(), position.clone()), Consumer::new(entries, position))
}

fn model(preemptions: Option<usize>, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(f);
}

/// FUTEX_WAIT and FUTEX_WAKE on one word.
struct Futex {
    word: Arc<AtomicU32>,
    queue: Mutex<()>,
    woken: Condvar,
}

impl Futex {
    fn new() -> Arc<Self> {
        Arc::new(Self { word: Arc::new(AtomicU32::new(0)), queue: Mutex::new(()), woken: Condvar::new() })
    }

    /// Sleeps if the word still holds `expected`.
    fn wait(&self, expected: u32) {
        let queue = self.queue.lock().unwrap();
        if self.word.load(Relaxed) == expected {
            drop(self.woken.wait(queue).unwrap());
        }
    }

    fn wake(&self) {
        let _queue = self.queue.lock().unwrap();
        self.woken.notify_all();
    }
}

/// Pops until something comes, yielding in between.
fn pop_spinning(rx: &mut Rx) -> u64 {
    loop {
        if let Some(words) = rx.pop().unwrap() {
            return words[1];
        }
        thread::yield_now();
    }
}

/// Goal:   an entry is whole when its sequence is seen, and is not written again before its copy is
///         complete (trap 2), over the wrap of the ring.
/// Method: three messages through two entries. Reading or writing an entry too early is a race.
#[test]
fn ring_of_two_wraps_without_a_race() {
    model(None, || {
        let (mut tx, mut rx) = ring(2);
        let producer = thread::spawn(move || {
            for id in 1..=3 {
                while !tx.push([0, id]).unwrap() {
                    thread::yield_now();
                }
            }
        });
        for id in 1..=3 {
            // A peek is as good as a pop: whole, and of the entry that comes next.
            assert!(rx.peek().is_none_or(|words| words[1] == id));
            assert_eq!(pop_spinning(&mut rx), id);
            rx.publish();
        }
        producer.join().unwrap();
        assert_eq!(rx.pop(), Ok(None));
    });
}

/// Goal:   the same with a ring that is re-used for every message.
/// Method: three messages through one entry.
#[test]
fn ring_of_one_wraps_without_a_race() {
    model(None, || {
        let (mut tx, mut rx) = ring(1);
        let producer = thread::spawn(move || {
            for id in 1..=3 {
                while !tx.push([0, id]).unwrap() {
                    thread::yield_now();
                }
            }
        });
        for id in 1..=3 {
            assert_eq!(pop_spinning(&mut rx), id);
            rx.publish();
        }
        producer.join().unwrap();
    });
}

/// Goal:   a client that has seen a completion sees the position of its submission too: what was executed
///         is never called "not executed" (FAULTS §5).
/// Method: the server pops, publishes, then completes; the client looks at the position after it has taken
///         the completion.
#[test]
fn f50_a_completion_is_never_seen_before_its_published_position() {
    model(None, || {
        let (mut submit, mut submitted) = ring(2);
        let (mut complete, mut completed) = ring(2);
        assert!(submit.push([0, 7]).unwrap());
        let server = thread::spawn(move || {
            let words = submitted.pop().unwrap().expect("submitted before the thread started");
            submitted.publish();
            assert!(complete.push([0, words[1]]).unwrap());
        });
        if let Some(words) = completed.pop().unwrap() {
            assert_eq!(words[1], 7);
            submit.refresh().unwrap();
            assert_eq!(submit.outstanding(), 0);
        }
        server.join().unwrap();
    });
}

/// Goal:   a server that goes to sleep misses no submission (trap 8, F25 without the sweep).
/// Method: the client publishes two entries, each with a flush of its own; the server sleeps whenever it
///         finds nothing. A lost wake leaves it asleep for ever.
#[test]
fn trap08_a_sleeping_server_is_woken_for_every_submission() {
    model(Some(3), || {
        let (mut tx, mut rx) = ring(2);
        let futex = Futex::new();
        let theirs = futex.clone();
        let client = thread::spawn(move || {
            let bell = ServerBell(theirs.word.clone());
            for id in 1..=2 {
                assert!(tx.push([0, id]).unwrap());
                fence_before_bell();
                if bell.take(Published::Submissions) {
                    theirs.wake();
                }
            }
        });
        let bell = ServerBell(futex.word.clone());
        let mut next = 1;
        while next <= 2 {
            if let Some(words) = rx.pop().unwrap() {
                assert_eq!(words[1], next);
                next += 1;
                continue;
            }
            bell.mark(ASLEEP);
            if !rx.is_ready() {
                futex.wait(ASLEEP);
            }
            bell.clear();
        }
        client.join().unwrap();
    });
}

/// Goal:   as above, complete: every interleaving of one sleep and one wake.
/// Method: one entry, no bound.
#[test]
fn trap08_a_sleeping_server_is_woken_once_in_every_interleaving() {
    model(None, || {
        let (mut tx, mut rx) = ring(1);
        let futex = Futex::new();
        let theirs = futex.clone();
        let client = thread::spawn(move || {
            assert!(tx.push([0, 1]).unwrap());
            fence_before_bell();
            if ServerBell(theirs.word.clone()).take(Published::Submissions) {
                theirs.wake();
            }
        });
        let bell = ServerBell(futex.word.clone());
        while rx.pop().unwrap().is_none() {
            bell.mark(ASLEEP);
            if !rx.is_ready() {
                futex.wait(ASLEEP);
            }
            bell.clear();
        }
        client.join().unwrap();
    });
}

/// Goal:   two client threads that share a flush rule wake the server for both submissions, whoever of
///         them takes the mark.
/// Method: two rings, a thread each, one bell; the server waits for both.
#[test]
fn trap08_two_clients_of_one_bell_lose_no_wake() {
    model(Some(2), || {
        let futex = Futex::new();
        let (mut rings, clients): (Vec<_>, Vec<_>) = (0..2u64)
            .map(|id| {
                let (mut tx, rx) = ring(1);
                let theirs = futex.clone();
                let client = thread::spawn(move || {
                    assert!(tx.push([0, id]).unwrap());
                    fence_before_bell();
                    if ServerBell(theirs.word.clone()).take(Published::Submissions) {
                        theirs.wake();
                    }
                });
                (rx, client)
            })
            .unzip();
        let bell = ServerBell(futex.word.clone());
        let mut seen = 0;
        while seen < 2 {
            let before = seen;
            for rx in &mut rings {
                seen += usize::from(rx.pop().unwrap().is_some());
            }
            if seen > before {
                continue;
            }
            bell.mark(ASLEEP);
            if !rings.iter().any(Consumer::is_ready) {
                futex.wait(ASLEEP);
            }
            bell.clear();
        }
        for client in clients {
            client.join().unwrap();
        }
    });
}

/// Goal:   a server that waits for completion space (bell value 2) is woken when the client has consumed.
/// Method: the completion ring is full; the client takes one entry, publishes its position, looks at the
///         bell. The server must get its entry in.
#[test]
fn trap08_a_server_that_wants_space_is_woken_by_consuming() {
    model(None, || {
        let (mut tx, mut rx) = ring(1);
        assert!(tx.push([0, 1]).unwrap());
        let futex = Futex::new();
        let theirs = futex.clone();
        let client = thread::spawn(move || {
            assert_eq!(rx.pop().unwrap().expect("pushed before the thread started")[1], 1);
            rx.publish();
            fence_before_bell();
            if ServerBell(theirs.word.clone()).take(Published::Consumed) {
                theirs.wake();
            }
            rx
        });
        let bell = ServerBell(futex.word.clone());
        while !tx.push([0, 2]).unwrap() {
            bell.mark(ASLEEP_WANTS_SPACE);
            tx.refresh().unwrap();
            if tx.outstanding() == tx.capacity() {
                futex.wait(ASLEEP_WANTS_SPACE);
            }
            bell.clear();
        }
        let mut rx = client.join().unwrap();
        assert_eq!(rx.pop().unwrap().expect("pushed")[1], 2);
    });
}

/// Goal:   a client that goes to sleep misses no completion.
/// Method: the server completes twice, a round each; the client sleeps whenever it finds nothing.
#[test]
fn trap08_a_sleeping_client_is_woken_for_every_completion() {
    model(Some(5), || {
        let (mut tx, mut rx) = ring(2);
        let futex = Futex::new();
        let theirs = futex.clone();
        let server = thread::spawn(move || {
            let bell = ClientBell(theirs.word.clone());
            for id in 1..=2 {
                assert!(tx.push([0, id]).unwrap());
                fence_before_bell();
                if bell.take() & WAITER_FUTEX != 0 {
                    theirs.wake();
                }
            }
        });
        let bell = ClientBell(futex.word.clone());
        let mut next = 1;
        while next <= 2 {
            if let Some(words) = rx.pop().unwrap() {
                assert_eq!(words[1], next);
                next += 1;
                continue;
            }
            let value = bell.mark(WAITER_FUTEX);
            if !rx.is_ready() {
                futex.wait(value);
            }
            bell.clear(WAITER_FUTEX);
        }
        server.join().unwrap();
    });
}

/// Goal:   waiters of both kinds on one client bell are woken, each in its way.
/// Method: one thread sleeps on the word, one on a socket (a place of its own that remembers a message);
///         the server publishes once and serves the bits that it took.
#[test]
fn trap08_both_kinds_of_client_waiters_are_woken() {
    model(Some(4), || {
        let done = Arc::new(AtomicU32::new(0));
        let futex = Futex::new();
        let socket = Futex::new();
        let sleeper = {
            let (done, futex) = (done.clone(), futex.clone());
            thread::spawn(move || {
                let bell = ClientBell(futex.word.clone());
                while done.load(Relaxed) == 0 {
                    let value = bell.mark(WAITER_FUTEX);
                    if done.load(Relaxed) == 0 {
                        futex.wait(value);
                    }
                    bell.clear(WAITER_FUTEX);
                }
            })
        };
        let poller = {
            let (done, futex, socket) = (done.clone(), futex.clone(), socket.clone());
            thread::spawn(move || {
                ClientBell(futex.word.clone()).mark(WAITER_SOCKET);
                if done.load(Relaxed) == 0 {
                    socket.wait(0);
                }
            })
        };
        done.store(1, Relaxed);
        fence_before_bell();
        let waiters = ClientBell(futex.word.clone()).take();
        if waiters & WAITER_FUTEX != 0 {
            futex.wake();
        }
        if waiters & WAITER_SOCKET != 0 {
            socket.word.store(1, Relaxed);
            socket.wake();
        }
        sleeper.join().unwrap();
        poller.join().unwrap();
    });
}

/// Hints for `slots` slots, and their slot words.
fn hints(slots: u32) -> (Hints<std::sync::Arc<[AtomicU64]>>, std::sync::Arc<[AtomicU64]>) {
    let words = 1 + slots.div_ceil(64);
    let new = |n: u32| (0..n).map(|_| AtomicU64::new(0)).collect::<std::sync::Arc<[_]>>();
    (Hints::new(new(words), slots), new(slots))
}

/// Goal:   a hint is never lost, and the slot word is there when its hint is taken (trap 19).
/// Method: the client writes and hints at two slots of one bitmap word (the second may ride on the summary
///         of the first); the server takes twice meanwhile, and once after the client has ended.
#[test]
fn trap19_a_hint_is_never_lost_and_never_early() {
    model(None, || {
        let (set, words) = hints(2);
        let set = std::sync::Arc::new(set);
        let client = {
            let (set, words) = (set.clone(), words.clone());
            thread::spawn(move || {
                for slot in 0..2u32 {
                    words[slot as usize].store(1, Relaxed);
                    set.set(slot);
                }
            })
        };
        let mut found = [0; 2];
        let mut take = || {
            set.take(|slot| {
                assert_eq!(words[slot as usize].load(Relaxed), 1, "hinted before it was written");
                found[slot as usize] += 1;
            })
            .unwrap();
        };
        take();
        take();
        client.join().unwrap();
        take();
        assert_eq!(found, [1, 1]);
    });
}

/// Goal:   a hint wakes a sleeping server, and is found by a server that looks before it sleeps.
/// Method: one hint, one bell; the server sleeps until it has taken it.
#[test]
fn trap08_a_hint_wakes_a_sleeping_server() {
    model(None, || {
        let (set, words) = hints(1);
        let set = std::sync::Arc::new(set);
        let futex = Futex::new();
        let client = {
            let (set, words, futex) = (set.clone(), words.clone(), futex.clone());
            thread::spawn(move || {
                words[0].store(1, Relaxed);
                set.set(0);
                fence_before_bell();
                if ServerBell(futex.word.clone()).take(Published::Submissions) {
                    futex.wake();
                }
            })
        };
        let bell = ServerBell(futex.word.clone());
        let mut found = 0;
        while found == 0 {
            bell.mark(ASLEEP);
            if !set.any() {
                futex.wait(ASLEEP);
            }
            bell.clear();
            set.take(|slot| found += words[slot as usize].load(Relaxed)).unwrap();
        }
        assert_eq!(found, 1);
        client.join().unwrap();
    });
}

/// Goal:   S5: whatever the client consumes when, a terminal completion always finds its reserved space,
///         and frames use no more than the rest.
/// Method: a ring of two, one call admitted; the server sends a frame when more than the reserved entry is
///         free, tries again, then completes. The client takes and publishes in between.
#[test]
fn f22_a_reserved_completion_never_finds_the_ring_full() {
    model(None, || {
        let (mut tx, mut rx) = ring(2);
        let server = thread::spawn(move || {
            let reserved = 1;
            let mut sent = 0;
            for _ in 0..2 {
                tx.refresh().unwrap();
                if tx.capacity() - tx.outstanding() > reserved {
                    sent += 1;
                    assert!(tx.push([0, sent]).unwrap());
                }
            }
            assert!(tx.push([0, sent + 1]).unwrap(), "the terminal's space was reserved");
            sent + 1
        });
        let mut next = 1;
        for _ in 0..2 {
            if let Some(words) = rx.pop().unwrap() {
                assert_eq!(words[1], next);
                rx.publish();
                next += 1;
            }
        }
        let sent = server.join().unwrap();
        while let Some(words) = rx.pop().unwrap() {
            assert_eq!(words[1], next);
            next += 1;
        }
        assert_eq!(next, sent + 1);
    });
}

/// Takes entries of a lane's two rings in the order of [`Drain`] until all `wanted` have come, sleeping when there
/// is nothing; returns them as (ring, value).
fn drain_sleeping(mut rings: [Rx; 2], futex: &Futex, wanted: usize) -> Vec<(usize, u64)> {
    let bell = ServerBell(futex.word.clone());
    let mut drain = Drain::default();
    let mut taken = Vec::new();
    while taken.len() < wanted {
        let mut found = None;
        for ring in Drain::ORDER {
            if ring == INTERACTIVE && drain.interactive_now() == 0 && rings[BULK].is_ready() {
                continue;
            }
            if let Some(words) = rings[ring].pop().unwrap() {
                found = Some((ring, words[1]));
                break;
            }
        }
        match found {
            Some((ring, value)) => {
                let allowed = ring == BULK || drain.interactive_now() > 0;
                drain.took(ring, u32::from(allowed));
                taken.push((ring, value));
            }
            None => {
                bell.mark(ASLEEP);
                if !Drain::ORDER.iter().any(|ring| rings[*ring].is_ready()) {
                    futex.wait(ASLEEP);
                }
                bell.clear();
            }
        }
    }
    taken
}

/// Goal:   R2.8, P5: whatever ring an entry comes on, a sleeping server is woken for it; each ring keeps its order,
///         and a bulk entry that is there waits for no more than its share of interactive ones.
/// Method: a client that sends a bulk entry, then two interactive ones, each flushed, to a server that drains and
///         sleeps. Of the two interactive entries one at most may overtake the bulk entry before them.
#[test]
fn r2_8_the_two_priority_drain_loses_nothing_and_starves_nobody() {
    model(Some(2), || {
        let (mut interactive, on_interactive) = ring(2);
        let (mut bulk, on_bulk) = ring(2);
        let futex = Futex::new();
        let theirs = futex.clone();
        let client = thread::spawn(move || {
            let bell = ServerBell(theirs.word.clone());
            let flush = || {
                fence_before_bell();
                if bell.take(Published::Submissions) {
                    theirs.wake();
                }
            };
            assert!(bulk.push([0, 7]).unwrap());
            flush();
            for id in 1..=2 {
                assert!(interactive.push([0, id]).unwrap());
            }
            flush();
        });
        let taken = drain_sleeping([on_interactive, on_bulk], &futex, 3);
        let of =
            |ring| taken.iter().filter(move |(r, _)| *r == ring).map(|(_, value)| *value).collect::<Vec<_>>();
        assert_eq!((of(INTERACTIVE), of(BULK)), (vec![1, 2], vec![7]));
        // The bulk entry was there before either of the others.
        let at = taken.iter().position(|(ring, _)| *ring == BULK).unwrap();
        assert!(at <= Drain::RUN as usize, "{taken:?}");
        client.join().unwrap();
    });
}

/// Goal:   R2.8: with everything there, interactive entries go first, and a bulk entry ends their run.
/// Method: the order of two and two.
#[test]
fn r2_8_interactive_and_bulk_entries_take_turns() {
    model(None, || {
        let [(mut interactive, on_interactive), (mut bulk, on_bulk)] = [ring(2), ring(2)];
        for id in [1, 2] {
            assert!(interactive.push([0, id]).unwrap() && bulk.push([0, 6 + id]).unwrap());
        }
        let taken = drain_sleeping([on_interactive, on_bulk], &Futex::new(), 4);
        let values: Vec<u64> = taken.iter().map(|(_, value)| *value).collect();
        assert_eq!(values, [1, 7, 2, 8]);
    });
}

/// What a handler keeps about a connection: not shared by design, so any overlap is a race.
struct Touched(UnsafeCell<u64>);

// SAFETY: loom reports every pair of accesses that is not ordered.
unsafe impl Sync for Touched {}

impl Touched {
    /// A handler's work on it: read, then write.
    fn handle(&self) -> u64 {
        // SAFETY: loom reports any access that is not ordered before or after this one.
        self.0.with_mut(|count| unsafe {
            *count += 1;
            *count
        })
    }
}

/// A reactor that looks once, and answers the call that it finds with how many calls came before it.
fn answer_one(mut submissions: Rx, mut completions: Tx, connection: &Touched) {
    if submissions.pop().unwrap().is_some() {
        assert!(completions.push([0, connection.handle()]).unwrap());
    }
}

/// Two calls of one connection on two lanes, each with a reactor of its own; the second is sent before or after the
/// answer to the first was taken. Everybody looks once: among all interleavings is the one where all find something.
fn two_calls_on_two_lanes(waits: bool) {
    model(None, move || {
        let connection = Arc::new(Touched(UnsafeCell::new(0)));
        let lanes = [(ring(1), ring(1)), (ring(1), ring(1))];
        let [a, b] = lanes.map(|((submissions, theirs), (answers, completions))| {
            let connection = connection.clone();
            let reactor = thread::spawn(move || answer_one(theirs, answers, &connection));
            (submissions, completions, reactor)
        });
        let (mut submissions_a, mut completions_a, reactor_a) = a;
        let (mut submissions_b, mut completions_b, reactor_b) = b;
        assert!(submissions_a.push([0, 1]).unwrap());
        let first = completions_a.pop().unwrap();
        if first.is_some() || !waits {
            assert!(submissions_b.push([0, 2]).unwrap());
        }
        reactor_a.join().unwrap();
        reactor_b.join().unwrap();
        if let Some(words) = completions_b.pop().unwrap() {
            assert_eq!((first.map(|words| words[1]), words[1]), (Some(1), 2), "in order");
        }
    });
}

/// Goal:   P6: a connection that moves to another lane with nothing in flight starts its calls in order, and what
///         one reactor's handler did happened before the other's looks, without any lock.
/// Method: two reactors whose handlers touch one race-checked cell; the client moves between two calls.
#[test]
fn p6_a_connection_that_moves_with_nothing_in_flight_stays_in_order() {
    two_calls_on_two_lanes(true);
}

/// Goal:   the model above is one: a client that moves too early is found out.
#[test]
#[should_panic]
fn p6_the_model_finds_a_connection_that_moves_too_early() {
    two_calls_on_two_lanes(false);
}

/// A connection opened at home and used on a further lane as soon as its OPEN was answered; home tells the further
/// reactor before or after it answers. Everybody looks once.
fn open_then_attach(tells_first: bool) {
    model(None, move || {
        let (mut open, mut opens) = ring(1);
        let (mut answers, mut answered) = ring(1);
        let (mut attaches, mut attached) = ring(1);
        // The inbox: what has been put into it can be seen, and what it is about can be read.
        let told = Arc::new(AtomicU64::new(0));
        let inbox = told.clone();
        let home = thread::spawn(move || {
            let Some(words) = opens.pop().unwrap() else { return };
            let number = words[1] + 40;
            if tells_first {
                told.store(number, Relaxed);
                assert!(answers.push([0, number]).unwrap());
            } else {
                assert!(answers.push([0, number]).unwrap());
                told.store(number, Relaxed);
            }
        });
        let further = thread::spawn(move || {
            let Some(words) = attached.pop().unwrap() else { return };
            assert_eq!(inbox.load(Relaxed), words[1], "unknown: its session would be ended");
        });
        assert!(open.push([0, 2]).unwrap());
        if let Some(words) = answered.pop().unwrap() {
            assert!(attaches.push([0, words[1]]).unwrap());
        }
        home.join().unwrap();
        further.join().unwrap();
    });
}

/// Goal:   P6: the home reactor tells of a connection before it answers OPEN, so whoever attaches it is known, with
///         no lock and no wait on the message path.
/// Method: the client uses the number on a further lane as soon as it has it.
#[test]
fn p6_an_opened_connection_is_known_wherever_it_is_used() {
    open_then_attach(true);
}

/// Goal:   the model above is one: telling after the answer is found out.
#[test]
#[should_panic]
fn p6_the_model_finds_a_home_that_answers_before_it_tells() {
    open_then_attach(false);
}

/// The three words of a lane's leases.
fn lease_words() -> (LeaseWords<Arc<AtomicU32>>, LeaseWords<Arc<AtomicU32>>) {
    let words = [(); 3].map(|()| Arc::new(AtomicU32::new(0)));
    let end = || LeaseWords::new(words[0].clone(), words[1].clone(), words[2].clone());
    (end(), end())
}

/// Goal:   F59: memory that the server takes because its holder does not use it is used by nobody, and what the
///         holder did with it before is over.
/// Method: the client uses a lease twice, each time only if it may; the server takes it as soon as it can and then
///         touches the memory. Both at once is a race.
#[test]
fn f59_an_idle_lease_is_taken_only_while_nobody_uses_it() {
    model(None, || {
        let memory = Arc::new(UnsafeCell::new(0u64));
        let (ours, theirs) = lease_words();
        let shared = memory.clone();
        let client = thread::spawn(move || {
            for _ in 0..2 {
                theirs.enter();
                if theirs.is_void(1) {
                    theirs.end();
                    return;
                }
                // SAFETY: loom reports any access that is not ordered before or after this one.
                shared.with_mut(|p| unsafe { *p += 1 });
                theirs.end();
            }
        });
        for _ in 0..2 {
            if ours.take_back_idle(2) {
                // SAFETY: as above.
                memory.with_mut(|p| unsafe { *p = 0 });
                break;
            }
            thread::yield_now();
        }
        client.join().unwrap();
    });
}

/// Goal:   F59: who reads memory that was taken from under him knows that it was.
/// Method: the server takes a lease by force and changes its memory; a client that sees the change must see that
///         the lease is gone.
#[test]
fn f59_what_was_read_from_a_lease_that_was_taken_is_known_to_be_void() {
    model(None, || {
        let memory = Arc::new(AtomicU64::new(7));
        let (ours, theirs) = lease_words();
        let shared = memory.clone();
        let client = thread::spawn(move || {
            let read = shared.load(Relaxed);
            assert!(read == 7 || theirs.is_gone(1), "zeros were believed");
        });
        ours.take_back(2);
        memory.store(0, Relaxed);
        client.join().unwrap();
    });
}

/// Goal:   P3: the slot of a request's frame is written again only after the frame has been copied out.
/// Method: two frames through one slot, the second as soon as the server word allows.
#[test]
fn p3_a_frames_slot_is_written_again_only_after_it_was_taken() {
    model(None, || {
        let slot = Arc::new(UnsafeCell::new(0u64));
        let word = Arc::new(AtomicU64::new(0));
        let (mut tx, mut rx) = ring(2);
        let (shared, taken) = (slot.clone(), word.clone());
        let server = thread::spawn(move || {
            for frame in 1..=2u32 {
                assert_eq!(pop_spinning(&mut rx), u64::from(frame));
                // SAFETY: loom reports any access that is not ordered before or after this one.
                assert_eq!(shared.with(|p| unsafe { *p }), u64::from(frame));
                ServerWord { generation: 1, taken: frame }.publish(&taken);
            }
        });
        for frame in 1..=2u32 {
            while ServerWord::read(&word).taken < frame - 1 {
                thread::yield_now();
            }
            // SAFETY: as above.
            slot.with_mut(|p| unsafe { *p = u64::from(frame) });
            assert!(tx.push([0, frame.into()]).unwrap());
        }
        server.join().unwrap();
    });
}

/// Goal:   P4: the slot of an answer's frame is written again only after the client has done with the frame.
/// Method: two frames through one slot: the second once the client's word, which a hint tells of, allows.
#[test]
fn p4_an_answers_slot_is_written_again_only_after_it_was_released() {
    model(None, || {
        let slot = Arc::new(UnsafeCell::new(0u64));
        let (set, words) = hints(1);
        let set = std::sync::Arc::new(set);
        let (mut tx, mut rx) = ring(2);
        let client = {
            let (slot, set, words) = (slot.clone(), set.clone(), words.clone());
            thread::spawn(move || {
                for frame in 1..=2 {
                    assert_eq!(pop_spinning(&mut rx), frame);
                    // SAFETY: loom reports any access that is not ordered before or after this one.
                    assert_eq!(slot.with(|p| unsafe { *p }), frame);
                    words[0].store(frame, Relaxed);
                    set.set(0);
                }
            })
        };
        let mut released = 0;
        for frame in 1..=2 {
            while released < frame - 1 {
                set.take(|_| released = words[0].load(Relaxed)).unwrap();
                thread::yield_now();
            }
            // SAFETY: as above.
            slot.with_mut(|p| unsafe { *p = frame });
            assert!(tx.push([0, frame]).unwrap());
        }
        client.join().unwrap();
    });
}

/// Bytes of pipes, each a race-checked cell.
struct Cells(Vec<UnsafeCell<u8>>);

// SAFETY: loom reports accesses that are not ordered.
unsafe impl Sync for Cells {}
// SAFETY: as for `Sync`.
unsafe impl Send for Cells {}

impl Store for Cells {
    fn read(&self, offset: usize, target: &mut [u8]) {
        for (i, byte) in target.iter_mut().enumerate() {
            // SAFETY: as for `Sync`.
            *byte = self.0[offset + i].with(|p| unsafe { *p });
        }
    }

    fn write(&self, offset: usize, source: &[u8]) {
        for (i, byte) in source.iter().enumerate() {
            // SAFETY: as for `Sync`.
            self.0[offset + i].with_mut(|p| unsafe { *p = *byte });
        }
    }
}

/// What a worker and a reactor share of pipe 0.
struct Desk {
    pipe: Pipe,
    ready: ReadySet,
    bytes: Cells,
    /// The reactor sleeps here.
    bell: Arc<Futex>,
    /// The worker does; 1 once it has been woken.
    woken: Arc<Futex>,
}

impl Desk {
    fn new(bytes: usize, range: PipeRange) -> Arc<Self> {
        Arc::new(Self {
            pipe: Pipe::new(range),
            ready: ReadySet::new(1),
            bytes: Cells((0..bytes).map(|_| UnsafeCell::new(0)).collect()),
            bell: Futex::new(),
            woken: Futex::new(),
        })
    }

    /// Worker: makes the pipe ready.
    fn notify(&self) {
        if self.ready.set(0) {
            fence_before_bell();
            if ServerBell(self.bell.word.clone()).take(Published::Submissions) {
                self.bell.wake();
            }
        }
    }

    /// Worker: writes all of `bytes`; `false` if it was cancelled.
    fn write(&self, writer: &mut PipeWriter, mut bytes: &[u8], more: bool) -> bool {
        loop {
            let now = writer.write(&self.pipe, &self.bytes, &[bytes]);
            bytes = &bytes[now..];
            if now > 0 {
                self.notify();
            }
            if bytes.is_empty() {
                return true;
            }
            self.woken.word.store(0, Relaxed);
            if !writer.wait(&self.pipe, 1, more) {
                return false;
            }
            self.notify();
            self.woken.wait(0);
        }
    }

    /// Worker: the same, but it polls for room, so that nothing but the pipe's own words orders the two.
    fn write_polling(&self, writer: &mut PipeWriter, mut bytes: &[u8], more: bool) {
        loop {
            let now = writer.write(&self.pipe, &self.bytes, &[bytes]);
            bytes = &bytes[now..];
            if bytes.is_empty() {
                return;
            }
            if more {
                assert!(writer.wait(&self.pipe, 1, true));
            }
            self.ready.set(0);
            thread::yield_now();
        }
    }

    /// Reactor: wakes the worker.
    fn wake(&self) {
        let _queue = self.woken.queue.lock().unwrap();
        self.woken.word.store(1, Relaxed);
        self.woken.woken.notify_all();
    }

    /// Reactor: waits until the pipe is ready, and takes it from the set, or until there is something `else`: says
    /// whether there is. It sleeps the first time (`slept`), and polls from then on: see the bounds at the top.
    fn wait(&self, slept: &mut bool, other: &mut dyn FnMut() -> bool) -> bool {
        let bell = ServerBell(self.bell.word.clone());
        loop {
            if !std::mem::replace(slept, true) {
                bell.mark(ASLEEP);
                if !self.ready.any() && !other() {
                    self.bell.wait(ASLEEP);
                }
                bell.clear();
            }
            if other() {
                return true;
            }
            let mut found = false;
            self.ready.take(|_| found = true);
            if found {
                return false;
            }
            thread::yield_now();
        }
    }

    /// Reactor: takes what is there.
    fn drain(&self, reader: &mut PipeReader, got: &mut Vec<u8>) {
        let mut bytes = vec![0; reader.available(&self.pipe)];
        reader.take(&self.pipe, &self.bytes, &mut bytes);
        reader.publish(&self.pipe);
        if reader.wake_is_due(&self.pipe) {
            self.wake();
        }
        got.extend_from_slice(&bytes);
    }
}

/// Goal:   R1.9, R2.5: what a worker writes comes whole and in order to a reactor that sleeps meanwhile, over the wrap of
///         the pipe; a worker that waits for room is woken; neither sleeps for ever. The end is seen after all bytes.
/// Method: three bytes through a pipe of two.
#[test]
fn r1_9_a_pipe_loses_nothing_and_no_wake() {
    model(Some(3), || {
        let range = PipeRange { offset: 0, len: 2 };
        let desk = Desk::new(2, range);
        let theirs = desk.clone();
        let worker = thread::spawn(move || {
            let mut writer = PipeWriter::new(range);
            assert!(theirs.write(&mut writer, &[1, 2, 3], false));
            theirs.pipe.finish();
            theirs.notify();
        });
        let (mut reader, mut got) = (PipeReader::default(), Vec::new());
        let mut slept = false;
        loop {
            desk.wait(&mut slept, &mut || false);
            let done = desk.pipe.is_done();
            desk.drain(&mut reader, &mut got);
            if done {
                break;
            }
        }
        assert_eq!(got, [1, 2, 3]);
        worker.join().unwrap();
    });
}

/// Goal:   as above, complete: every interleaving of one chunk and the end.
#[test]
fn r2_5_a_chunk_and_the_end_wake_a_sleeping_reactor_in_every_interleaving() {
    model(None, || {
        let range = PipeRange { offset: 0, len: 1 };
        let desk = Desk::new(1, range);
        let theirs = desk.clone();
        let worker = thread::spawn(move || {
            let mut writer = PipeWriter::new(range);
            assert_eq!(writer.write(&theirs.pipe, &theirs.bytes, &[&[7]]), 1);
            theirs.pipe.finish();
            theirs.notify();
        });
        let (mut reader, mut got) = (PipeReader::default(), Vec::new());
        desk.wait(&mut false, &mut || false);
        assert!(desk.pipe.is_done());
        desk.drain(&mut reader, &mut got);
        assert_eq!(got, [7]);
        worker.join().unwrap();
    });
}

/// Goal:   trap 2: a byte is written over only when it has been copied.
/// Method: two bytes through a pipe of one; both sides poll, for a lock that they meet at would order them.
#[test]
fn trap02_a_byte_of_a_pipe_is_written_again_only_after_it_was_taken() {
    model(Some(3), || {
        let range = PipeRange { offset: 0, len: 1 };
        let desk = Desk::new(1, range);
        let theirs = desk.clone();
        let worker = thread::spawn(move || {
            theirs.write_polling(&mut PipeWriter::new(range), &[1, 2], false);
        });
        let (mut reader, mut got) = (PipeReader::default(), Vec::new());
        while got.len() < 2 {
            desk.drain(&mut reader, &mut got);
            thread::yield_now();
        }
        assert_eq!(got, [1, 2]);
        worker.join().unwrap();
    });
}

/// Goal:   a writer that changes to a longer range loses nothing; the old range is used by others only when both sides
///         have done with it, the new one only when whoever had it before has.
/// Method: the reader uses the new range itself before it offers it, and the old one once the writer has changed.
#[test]
fn a_pipe_changes_its_range_between_two_bytes() {
    model(Some(2), || {
        let (short, long) = (PipeRange { offset: 0, len: 1 }, PipeRange { offset: 1, len: 2 });
        let desk = Desk::new(3, short);
        let theirs = desk.clone();
        let worker = thread::spawn(move || {
            theirs.write_polling(&mut PipeWriter::new(short), &[1, 2, 3], true);
            theirs.pipe.finish();
            theirs.ready.set(0);
        });
        let (mut reader, mut got, mut slept) = (PipeReader::default(), Vec::new(), true);
        let (mut offered, mut changed) = (false, false);
        loop {
            desk.wait(&mut slept, &mut || false);
            let done = desk.pipe.is_done();
            desk.drain(&mut reader, &mut got);
            // After what was taken has been published: the offer has to stand for itself.
            if reader.wants_more(&desk.pipe) && !offered {
                offered = true;
                desk.bytes.write(1, &[9, 9]);
                reader.offer(&desk.pipe, long);
            }
            if offered && !changed && reader.available(&desk.pipe) > 0 && reader.uses(&desk.pipe, long) {
                changed = true;
                desk.bytes.write(0, &[9]);
            }
            if done {
                break;
            }
        }
        assert_eq!(got, [1, 2, 3]);
        worker.join().unwrap();
    });
}

/// Goal:   R2.6, trap 19: of a cancel and a completion that race exactly one ends the call; a worker that waits is told;
///         the pipe is used again only when the worker has done with it.
/// Method: a worker that has to wait for room, and then ends; a client that cancels at any time, by a hint and the same
///         bell. The reactor ends the call by whichever it sees first, goes on until the worker has ended, and then uses
///         the bytes itself.
#[test]
fn r2_6_trap19_a_cancel_and_a_completion_that_race_end_a_call_once() {
    model(Some(2), || {
        let range = PipeRange { offset: 0, len: 1 };
        let desk = Desk::new(1, range);
        let hint = Arc::new(AtomicU32::new(0));
        let theirs = desk.clone();
        let worker = thread::spawn(move || {
            let mut writer = PipeWriter::new(range);
            let written = theirs.write(&mut writer, &[1, 2], false);
            theirs.pipe.finish();
            theirs.notify();
            written
        });
        let (asked, bell) = (hint.clone(), desk.bell.clone());
        let client = thread::spawn(move || {
            asked.store(1, Relaxed);
            fence_before_bell();
            if ServerBell(bell.word.clone()).take(Published::Submissions) {
                bell.wake();
            }
        });
        let (mut reader, mut got, mut terminals) = (PipeReader::default(), Vec::new(), Vec::new());
        let (mut hinted, mut slept) = (false, false);
        loop {
            let cancelled = desk.wait(&mut slept, &mut || !hinted && hint.load(Relaxed) == 1);
            let done = desk.pipe.is_done();
            if cancelled {
                hinted = true;
                if terminals.is_empty() {
                    terminals.push("cancelled");
                    if desk.pipe.cancel() {
                        desk.wake();
                    }
                }
            } else if terminals.is_empty() {
                desk.drain(&mut reader, &mut got);
                if done {
                    terminals.push("ok");
                }
            }
            if done {
                break;
            }
        }
        desk.bytes.write(0, &[9]);
        let written = worker.join().unwrap();
        client.join().unwrap();
        assert_eq!(terminals.len(), 1);
        assert!(terminals[0] != "ok" || written && got == [1, 2]);
    });
}
