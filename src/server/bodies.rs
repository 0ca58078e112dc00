//! How a lane moves its calls of several frames (`exchange.rs` says what they are).

use super::analyze::FileQuestion;
use super::deferred::{AsyncCall, DROPPED, Deferred, End, Executor};
use super::exchange::{Body, Exchange, Frame, LaneExchanges, Plan, Terminal, Work};
use super::inspect::QUESTION_NS;
use super::jobs::{Answer, Ticket};
use super::lane::{Bench, Outcome, Places, SessionLane, Turn, failure};
use super::table::{
    Context, Defer, Deferral, Elsewhere, Entry, Handler, HandlerError, Progress, Reply, Rest, Window,
};
use super::tickets::Look;
use crate::inspect::TracedCall;
use crate::metrics::{Counters, Ended, Totals};
use crate::protocol::{MessageType, TraceParent};
use doorbell_shm::PeerFault;
use doorbell_shm::entry::{Completion, Status, Submission, flag, kind};
use doorbell_shm::kill_point;
use doorbell_shm::lane::Drain;
use doorbell_shm::layout::{LaneLayout, SLOT_SMALL};
use doorbell_shm::slots::ServerWord;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What became of an exchange in one step.
enum Next {
    /// It can go on at once; others have their turn first.
    Again,
    /// It waits for a frame, credit or memory.
    Waits,
    /// It waits for space in the completion ring.
    WantsSpace,
    /// All of its answer, but for its terminal completion, has been sent.
    Ends(Terminal),
}

impl SessionLane {
    /// Begins a call whose body has more frames, or whose handler is not one for whole requests.
    #[cold]
    pub(super) fn begin<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        places: Places,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let plan = match plan(call, bench) {
            Ok(plan) => plan,
            Err(outcome) => {
                self.give_back_places(call, places);
                let (record, _) = bench.timing.take_up(call.message_type, call.connection);
                bench.metrics.count_call(outcome.status);
                self.complete(ring, call, outcome)?;
                let ended = Ended { record, connection: call.connection, session: id, sent: 0, calls: 1 };
                if bench.timing.ended(ended) {
                    bench.count_times();
                }
                return Ok(());
            }
        };
        match plan {
            Plan::Deferred(defer) => return self.begin_deferred(id, ring, call, places, defer, bench),
            Plan::Elsewhere(elsewhere) => {
                return self.begin_elsewhere(id, ring, call, places, elsewhere, bench);
            }
            Plan::Whole(_) | Plan::Pieces(_) => {}
        }
        let (index, mut exchange) = bench.begin(call, places, ring, id);
        exchange.next_frame = 1;
        let meta = u32::from(call.meta_len);
        exchange.parked.push_back(Frame { slot: places.payload, len: call.len, at: meta });
        let counted = exchange.count(call.len - meta, call.flags & flag::END != 0);
        bench.pulse.runs(call.message_type);
        let context = context(bench.state, bench.metrics, bench.totals, call, places.traceparent.as_ref());
        let announced = (call.body_len != 0).then_some(call.body_len);
        match plan {
            Plan::Whole(most) => exchange.work = Work::Waits(announced.map_or(most, |len| len as usize)),
            Plan::Pieces(make) => match catch_unwind(AssertUnwindSafe(|| make(&context, announced))) {
                Ok(Ok(pieces)) => exchange.work = Work::Pieces(pieces),
                refused => {
                    let refused = refused.map(|made| made.map(|_| ()));
                    self.fail(&mut exchange, refused, bench);
                }
            },
            Plan::Deferred(_) | Plan::Elsewhere(_) => {}
        }
        self.insert(ring, call.slot, index);
        bench.exchanges.put(index, exchange);
        counted?;
        self.step(index, bench)
    }

    /// Goes on with a call whose answer did not fit its slot.
    #[cold]
    pub(super) fn go_on<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        places: Places,
        outcome: Outcome,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let (index, mut exchange) = bench.begin(call, places, ring, id);
        self.give_back_request(call, places);
        exchange.ended = true;
        exchange.filled = outcome.len as u32;
        std::mem::swap(&mut exchange.spill, &mut bench.rest.spill);
        clean(bench.rest, bench.message_max);
        exchange.work = Work::Answered;
        exchange.terminal = Some(Terminal { status: outcome.status, detail: outcome.detail });
        bench.metrics.bytes_in += u64::from(call.len);
        bench.metrics.bytes_out += u64::from(exchange.filled);
        self.insert(ring, call.slot, index);
        bench.exchanges.put(index, exchange);
        self.step(index, bench)
    }

    /// Runs a call of one frame whose answer may be left to the reactor.
    fn begin_deferred<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        places: Places,
        defer: Defer,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        // Copied once: from here on the client can change the slot but not the request (S3, F15).
        let request = bench.staging.take(call.len as usize);
        self.lane().common.payload.read(LaneLayout::slot_offset(places.payload), request);
        let request = &request[call.meta_len as usize..];
        let deferral = catch_unwind(AssertUnwindSafe(|| defer(call.codec, request)));
        let (index, mut exchange) = bench.begin(call, places, ring, id);
        self.give_back_request(call, places);
        exchange.ended = true;
        bench.metrics.bytes_in += u64::from(call.len);
        self.settle(index, &mut exchange, deferral, bench);
        self.insert(ring, call.slot, index);
        bench.exchanges.put(index, exchange);
        self.step(index, bench)
    }

    /// Runs a call of one frame that is answered from elsewhere.
    fn begin_elsewhere<S>(
        &mut self,
        id: u32,
        ring: usize,
        call: &Submission,
        places: Places,
        elsewhere: Elsewhere<S>,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let (index, mut exchange) = bench.begin(call, places, ring, id);
        // Copied once: from here on the client can change the slot but not the request (S3, F15). Beside the bench,
        // which the handler's ticket needs.
        let mut request = std::mem::take(bench.request);
        request.resize(call.len as usize, 0);
        self.lane().common.payload.read(LaneLayout::slot_offset(places.payload), &mut request);
        self.give_back_request(call, places);
        exchange.ended = true;
        bench.metrics.bytes_in += u64::from(call.len);
        self.run_elsewhere(index, elsewhere, &request[call.meta_len as usize..], &mut exchange, bench);
        *bench.request = request;
        self.insert(ring, call.slot, index);
        bench.exchanges.put(index, exchange);
        self.step(index, bench)
    }

    /// Runs the handler of a call that is answered from elsewhere.
    fn run_elsewhere<S>(
        &mut self,
        index: u32,
        elsewhere: Elsewhere<S>,
        request: &[u8],
        e: &mut Exchange<S>,
        bench: &mut Bench<'_, S>,
    ) {
        self.hand_out(index, e, bench, |context, ticket, executor| match elsewhere {
            Elsewhere::Ticket(handler) => handler(context, request, ticket),
            Elsewhere::Future(handler) => {
                let call = AsyncCall::new(handler(context, request), ticket);
                match executor {
                    Some(execute) => execute(Box::pin(call)),
                    // Refused when the server was bound.
                    None => drop(call),
                }
                Ok(())
            }
        });
    }

    /// Gives a ticket for the answer of a call to `begin`.
    fn hand_out<S>(
        &mut self,
        index: u32,
        e: &mut Exchange<S>,
        bench: &mut Bench<'_, S>,
        begin: impl FnOnce(&Context<'_, S>, Deferred, Option<&Executor>) -> Result<(), HandlerError>,
    ) {
        let (number, ticket) = match bench.exchanges.tickets.open(e.seat, index) {
            Ok(Some(opened)) => opened,
            Ok(None) => {
                bench.metrics.deferred_refused += 1;
                return e.answer(Answer::busy(), bench.message_max);
            }
            Err(error) => {
                let traceparent = e.traceparent.map(tracing::field::display);
                tracing::warn!(%error, traceparent, "no memory for an answer that is deferred");
                return e.answer(Answer::busy(), bench.message_max);
            }
        };
        e.work = Work::Ticket(number);
        bench.pulse.runs(e.call.message_type);
        let traceparent = e.traceparent;
        let context = context(bench.state, bench.metrics, bench.totals, &e.call, traceparent.as_ref());
        let executor = bench.executor;
        let begun = catch_unwind(AssertUnwindSafe(|| begin(&context, ticket, executor)));
        if !matches!(begun, Ok(Ok(()))) {
            bench.exchanges.tickets.detach(number);
            self.fail(e, begun, bench);
        }
    }

    /// The only frame of a request has been taken.
    fn give_back_request(&mut self, call: &Submission, places: Places) {
        if places.payload != call.slot && places.payload != call.response_slot {
            self.lane_mut().give_back_payload(places.payload);
        }
    }

    /// Answers a call, or leaves that to the reactor.
    fn settle<S>(
        &mut self,
        index: u32,
        e: &mut Exchange<S>,
        deferral: std::thread::Result<Result<Deferral, HandlerError>>,
        bench: &mut Bench<'_, S>,
    ) {
        match deferral {
            Ok(Ok(Deferral::Answer(bytes))) => e.answer(Answer::of(bytes), bench.message_max),
            Ok(Ok(Deferral::File(path, question))) => {
                match bench.exchanges.jobs.add(e.seat, index, path, question) {
                    Some(number) => e.work = Work::Deferred(number),
                    None => e.answer(Answer::busy(), bench.message_max),
                }
            }
            Ok(Ok(Deferral::Inspect(question))) => match bench.exchanges.jobs.ask(e.seat, index, question) {
                Some(number) => {
                    (e.work, e.is_question) = (Work::Deferred(number), true);
                    let due = (bench.now_ns)().saturating_add(QUESTION_NS);
                    bench.exchanges.ends_by(e, due);
                }
                None => e.answer(Answer::busy(), bench.message_max),
            },
            Ok(Ok(Deferral::Question(question))) => self.ask(index, question, e, bench),
            refused => self.fail(e, refused.map(|refused| refused.map(|_| ())), bench),
        }
    }

    /// Has a question about a file answered.
    fn ask<S>(&mut self, index: u32, question: FileQuestion, e: &mut Exchange<S>, bench: &mut Bench<'_, S>) {
        let entry = bench.handlers.get(e.call.message_type as usize);
        let Some(handler) = entry.and_then(|entry| entry.questions) else {
            let why =
                "nobody answers questions about files here: ask without one, or run a server with providers";
            return e.answer(HandlerError::Failed(why.to_owned()).into(), bench.message_max);
        };
        self.hand_out(index, e, bench, |context, ticket, _| handler(context, question, ticket));
    }

    /// The reactor has read the file that a call asks about; `false` if that has ended meanwhile.
    pub(super) fn ask_deferred<S>(
        &mut self,
        ticket: Ticket,
        question: FileQuestion,
        bench: &mut Bench<'_, S>,
    ) -> bool {
        let Some(mut exchange) = bench.exchanges.take(ticket.exchange) else { return false };
        let waits = matches!(exchange.work, Work::Deferred(number) if number == ticket.number);
        if waits {
            bench.exchanges.jobs.answered(ticket.number);
            exchange.work = Work::Answered;
            self.ask(ticket.exchange, question, &mut exchange, bench);
            self.queue(ticket.exchange, &mut exchange);
        }
        bench.exchanges.put(ticket.exchange, exchange);
        waits
    }

    /// The reactor has the answer of a call; `false` if that has ended meanwhile.
    pub(super) fn answer_deferred<S>(
        &mut self,
        ticket: Ticket,
        answer: Answer,
        exchanges: &mut super::exchange::Exchanges<S>,
        message_max: usize,
    ) -> bool {
        let Some(exchange) = exchanges.get_mut(ticket.exchange) else { return false };
        // Where it stood may be another call by now.
        if !matches!(exchange.work, Work::Deferred(number) if number == ticket.number) {
            return false;
        }
        exchange.answer(answer, message_max);
        self.queue(ticket.exchange, exchange);
        exchanges.jobs.answered(ticket.number);
        true
    }

    fn insert(&mut self, ring: usize, slot: u32, index: u32) {
        self.reserve_terminal(ring);
        let names = self.lane().slots.len();
        let all = self.exchanges.get_or_insert_with(|| Box::new(LaneExchanges::new(names)));
        all.insert(slot, index);
    }

    /// A further frame of a request.
    #[inline(never)]
    pub(super) fn frame<S>(
        &mut self,
        ring: usize,
        entry: &Submission,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        check_frame(entry)?;
        let Submission { slot, generation, len, .. } = *entry;
        let (current, _) = self.lane().slots.call_in(slot)?;
        let index = self.exchanges.as_ref().and_then(|all| all.of_slot(slot));
        let live = index.filter(|_| current == generation);
        let Some(index) = live else {
            // Its call has ended; the client had not seen that. One that has not begun is a lie.
            if (generation.wrapping_sub(current) as i32) > 0 {
                return Err(PeerFault::Generation { slot, theirs: generation, expected: current });
            }
            return Ok(());
        };
        let Some(exchange) = bench.exchanges.get_mut(index) else { return Ok(()) };
        if exchange.ring != ring {
            return Err(PeerFault::Kind { kind: kind::FRAME });
        }
        let expected = if exchange.ended { u32::MAX } else { exchange.next_frame };
        if exchange.ended || entry.frame != expected {
            return Err(PeerFault::Frame { slot, theirs: entry.frame, expected });
        }
        let leased = entry.flags & flag::LEASED != 0;
        self.leases.used |= leased;
        if leased && self.lane().leases.is_gone(entry.lease_epoch) {
            return self.end_early(index, Status::TakenBack, 0, bench);
        }
        let place = entry.payload_slot;
        if place == slot && exchange.holds_own_slot() {
            return Err(PeerFault::SlotBusy { slot, generation });
        }
        if !leased && self.lane().leases.is_leased(place) {
            return Err(PeerFault::Slot { slot: place });
        }
        let capacity = if place == slot {
            self.lane().slots.capacity(slot)?
        } else {
            self.lane_mut().lend_payload(place)?
        };
        if len > capacity {
            return Err(PeerFault::Length { len, slot: place, capacity });
        }
        exchange.next_frame += 1;
        exchange.moved = true;
        exchange.count(len, entry.flags & flag::END != 0)?;
        exchange.parked.push_back(Frame { slot: place, len, at: 0 });
        kill_point!("server.frame.parked");
        if exchange.received > bench.message_max as u64 {
            let most = bench.message_max as u64;
            return self.end_early(index, Status::TooLarge, most, bench);
        }
        // Its copy takes a while: short calls that lie behind it in the ring come first.
        self.queue(index, exchange);
        Ok(())
    }

    /// The client has written the word of a call that is under way.
    #[cold]
    pub(super) fn hinted<S>(
        &mut self,
        id: u32,
        slot: u32,
        generation: u32,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let Some(word) = self.word_of(slot, generation) else { return Ok(()) };
        let Some(index) = self.exchanges.as_ref().and_then(|all| all.of_slot(slot)) else {
            // A LEASE that waits, or a slot that only carries payload.
            if word.cancelled
                && let Some(wish) = bench.leases.cancel(id, slot, generation)
            {
                return self.answer_control(wish.ring, slot, generation, Status::Cancelled, 0);
            }
            return Ok(());
        };
        if word.cancelled {
            kill_point!("server.cancel.heard");
            return self.end_early(index, Status::Cancelled, 0, bench);
        }
        let Some(exchange) = bench.exchanges.get_mut(index) else { return Ok(()) };
        exchange.release(word)?;
        exchange.moved = true;
        self.leases.used |= exchange.call.flags & flag::LEASED != 0;
        self.queue(index, exchange);
        Ok(())
    }

    fn queue<S>(&mut self, index: u32, exchange: &mut Exchange<S>) {
        if !exchange.queued && !exchange.wants_space {
            exchange.queued = true;
            if let Some(all) = &mut self.exchanges {
                all.ready[exchange.ring].push_back(index);
            }
        }
    }

    /// Memory for the body of an exchange has come.
    pub(super) fn run_exchange<S>(
        &mut self,
        seat: u32,
        index: u32,
        exchanges: &mut super::exchange::Exchanges<S>,
    ) {
        // It may have ended since, and its record may be that of another call, of another lane even (S2).
        if let Some(exchange) = exchanges.get_mut(index).filter(|exchange| exchange.seat == seat) {
            self.queue(index, exchange);
        }
    }

    /// Whether a turn would move an exchange.
    #[cold]
    pub(super) fn exchanges_have_work(&mut self) -> Result<bool, PeerFault> {
        let Some(all) = &self.exchanges else { return Ok(false) };
        if all.can_move() {
            return Ok(true);
        }
        for ring in Drain::ORDER {
            let wants = self.exchanges.as_ref().is_some_and(|all| all.wants_space(ring));
            if wants && self.frames_free(ring)? > 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Steps at most `most` exchanges of a ring that can move, one step each; returns how many.
    #[inline(never)]
    pub(super) fn move_exchanges<S>(
        &mut self,
        ring: usize,
        most: u32,
        turn: &mut Turn,
        bench: &mut Bench<'_, S>,
    ) -> Result<u32, PeerFault> {
        let wants = self.exchanges.as_ref().is_some_and(|all| all.wants_space(ring));
        if wants && self.frames_free(ring)? > 0 {
            let wanting = self.exchanges.as_mut().map(|all| std::mem::take(&mut all.wanting_space[ring]));
            for index in wanting.unwrap_or_default() {
                if let Some(exchange) = bench.exchanges.get_mut(index) {
                    exchange.wants_space = false;
                    self.queue(index, exchange);
                }
            }
        }
        // One that can go on stands at the end of the queue again, for the next turn: other lanes come before.
        let ready = self.exchanges.as_ref().map_or(0, |all| all.ready[ring].len() as u32);
        let mut moved = 0;
        while moved < ready.min(most) && turn.left(bench) > 0 {
            let next = self.exchanges.as_mut().and_then(|all| all.ready[ring].pop_front());
            let Some(index) = next else { break };
            if let Some(exchange) = bench.exchanges.get_mut(index) {
                exchange.queued = false;
            }
            self.step(index, bench)?;
            moved += 1;
            turn.taken += 1;
        }
        if self.exchanges.as_ref().is_some_and(|all| all.wants_space(ring)) {
            self.starve(ring);
        }
        Ok(moved)
    }

    /// One step of an exchange.
    fn step<S>(&mut self, index: u32, bench: &mut Bench<'_, S>) -> Result<(), PeerFault> {
        let Some(mut exchange) = bench.exchanges.take(index) else { return Ok(()) };
        let next = self.advance(index, &mut exchange, bench);
        if let Some(all) = &mut self.exchanges {
            exchange.count_unread(&mut all.unread);
        }
        bench.exchanges.put(index, exchange);
        match next? {
            Next::Ends(terminal) => return self.end(index, terminal, bench),
            Next::Waits => {}
            Next::Again => {
                if let Some(exchange) = bench.exchanges.get_mut(index) {
                    self.queue(index, exchange);
                }
            }
            Next::WantsSpace => {
                if let Some(exchange) = bench.exchanges.get_mut(index)
                    && let Some(all) = &mut self.exchanges
                {
                    let ring = exchange.ring;
                    exchange.wants_space = true;
                    all.wanting_space[ring].push(index);
                    self.starve(ring);
                }
            }
        }
        Ok(())
    }

    /// Moves an exchange as far as it goes, but takes one frame at most.
    fn advance<S>(
        &mut self,
        index: u32,
        e: &mut Exchange<S>,
        bench: &mut Bench<'_, S>,
    ) -> Result<Next, PeerFault> {
        let mut free = self.frames_free(e.ring)?;
        let mut took = false;
        loop {
            if e.has_spilled() {
                if let Some(waits) = self.send_spilled(e, &mut free, bench)? {
                    return Ok(waits);
                }
                continue;
            }
            if let Some(terminal) = e.terminal {
                return Ok(Next::Ends(terminal));
            }
            if took {
                if e.filled == e.window.capacity && free > 0 {
                    // Its reader need not wait for the next step.
                    self.send_frame(e)?;
                    free -= 1;
                }
                let more = !e.parked.is_empty() || e.ended;
                return if more { Ok(Next::Again) } else { self.send_partial(e, free) };
            }
            match &mut e.work {
                Work::Answered | Work::Deferred(_) => return Ok(Next::Waits),
                Work::Ticket(number) => {
                    let number = *number;
                    if let Some(next) = self.send_ticket(number, e, free, bench)? {
                        return Ok(next);
                    }
                    free = self.frames_free(e.ring)?;
                }
                Work::Waits(bytes) => {
                    let bytes = *bytes;
                    if !bench.exchanges.reserve(index, bytes) {
                        bench.metrics.bodies_waited += 1;
                        return Ok(Next::Waits);
                    }
                    match Body::new(bytes) {
                        Ok(body) => e.work = Work::Whole(body),
                        Err(error) => {
                            let traceparent = e.traceparent.map(tracing::field::display);
                            tracing::warn!(%error, bytes, traceparent, "no memory to put a request together");
                            bench.exchanges.give_back(bytes);
                            e.work = Work::Answered;
                            e.terminal = Some(Terminal { status: Status::Overloaded, detail: 10 });
                        }
                    }
                }
                Work::Whole(_) if !e.parked.is_empty() => {
                    self.put_together(e, bench);
                    took = true;
                }
                Work::Whole(_) if e.ended => self.run_whole(index, e, bench),
                Work::Whole(_) => return Ok(Next::Waits),
                Work::Pieces(_) => {
                    self.pass_empty_frames(e);
                    if e.parked.is_empty() && !e.ended {
                        return self.send_partial(e, free);
                    }
                    if e.filled == e.window.capacity {
                        if free == 0 {
                            return Ok(Next::WantsSpace);
                        }
                        self.send_frame(e)?;
                        free -= 1;
                    }
                    if e.window.credit() == 0 {
                        return Ok(Next::Waits);
                    }
                    self.give_piece(e, free, bench)?;
                    free = self.frames_free(e.ring)?;
                    took = true;
                }
            }
        }
    }

    /// Sends what the holder of a ticket has written, a frame at most; says how the exchange goes on, or `None` if that
    /// follows from what it has become.
    fn send_ticket<S>(
        &mut self,
        number: u32,
        e: &mut Exchange<S>,
        free: u64,
        bench: &mut Bench<'_, S>,
    ) -> Result<Option<Next>, PeerFault> {
        let available = match bench.exchanges.tickets.look(number) {
            Look::Bytes(available) => available,
            Look::Empty => {
                bench.exchanges.tickets.make_room(number);
                return self.send_written(e, free).map(Some);
            }
            Look::Ended(end) => {
                self.end_ticket(e, end, bench);
                return Ok(None);
            }
        };
        if e.window.credit() == 0 {
            // Whoever waits for room waits for the client; the rest of what he wants is seen to.
            bench.exchanges.tickets.make_room(number);
            return Ok(Some(Next::Waits));
        }
        let room = (e.window.capacity - e.filled) as usize;
        let len = available.min(room);
        if e.sent + e.filled as usize + len > bench.message_max {
            bench.exchanges.tickets.detach(number);
            e.work = Work::Answered;
            e.filled = 0;
            e.terminal = Some(Terminal { status: Status::TooLarge, detail: bench.message_max as u64 });
            return Ok(None);
        }
        // Through private memory: nobody has a reference to either side's bytes.
        let bytes = bench.staging.take(len);
        bench.exchanges.tickets.take(number, bytes);
        bench.exchanges.tickets.make_room(number);
        self.lane().common.payload.write(e.offset() + e.filled as usize, bytes);
        e.filled += len as u32;
        e.moved = true;
        bench.metrics.bytes_out += len as u64;
        if len < room {
            return Ok(None);
        }
        if free == 0 {
            return Ok(Some(Next::WantsSpace));
        }
        self.send_frame(e)?;
        Ok(Some(Next::Again))
    }

    /// Sends the frame that is being written, if anything is in it.
    fn send_written<S>(&mut self, e: &mut Exchange<S>, free: u64) -> Result<Next, PeerFault> {
        if e.filled == 0 {
            return Ok(Next::Waits);
        }
        if free == 0 {
            return Ok(Next::WantsSpace);
        }
        self.send_frame(e)?;
        Ok(Next::Waits)
    }

    /// The holder of a ticket has ended the answer.
    fn end_ticket<S>(&mut self, e: &mut Exchange<S>, end: Option<End>, bench: &mut Bench<'_, S>) {
        e.work = Work::Answered;
        let error = match end {
            None => {
                e.terminal = Some(Terminal { status: Status::Ok, detail: 0 });
                return;
            }
            Some(End::Rest(bytes)) => {
                if e.sent + e.filled as usize + bytes.len() > bench.message_max {
                    e.filled = 0;
                    return e.answer(HandlerError::TooLarge.into(), bench.message_max);
                }
                return e.answer(Answer::of(bytes), bench.message_max);
            }
            Some(End::Panicked) => Answer { status: Status::HandlerPanic, detail: 0, bytes: Vec::new() },
            Some(End::Failed(error)) => error.into(),
            Some(End::Dropped) => HandlerError::Failed(DROPPED.to_owned()).into(),
        };
        // What has not been sent is dropped.
        e.filled = 0;
        e.answer(error, bench.message_max);
    }

    /// Goes on with an exchange outside of its lane's turn, because the holder of its ticket has something to say;
    /// whether the lane has to be polled for the rest.
    pub(super) fn step_ticket<S>(&mut self, index: u32, bench: &mut Bench<'_, S>) -> Result<bool, PeerFault> {
        match bench.exchanges.get_mut(index) {
            // It has its turn anyway, or cannot move.
            Some(exchange) if exchange.queued || exchange.wants_space => return Ok(exchange.queued),
            Some(_) => {}
            None => return Ok(false),
        }
        self.step(index, bench)?;
        let all = self.exchanges.as_ref();
        Ok(all.is_some_and(|all| all.can_move() || Drain::ORDER.iter().any(|ring| all.wants_space(*ring))))
    }

    /// Sends what has been written of an answer whose request has nothing more to take at the moment.
    fn send_partial<S>(&mut self, e: &mut Exchange<S>, free: u64) -> Result<Next, PeerFault> {
        if e.filled == 0 || !matches!(e.work, Work::Pieces(_)) {
            return Ok(Next::Waits);
        }
        if free == 0 {
            return Ok(Next::WantsSpace);
        }
        self.send_frame(e)?;
        Ok(Next::Waits)
    }

    /// Publishes the frame that is being written; there is space for it.
    fn send_frame<S>(&mut self, e: &mut Exchange<S>) -> Result<(), PeerFault> {
        let len = e.filled;
        self.push_frame(e, e.window.frame, len)?;
        kill_point!("server.frame.sent");
        e.window.frame = e.window.frame.wrapping_add(1);
        e.filled = 0;
        Ok(())
    }

    fn push_frame<S>(&mut self, e: &mut Exchange<S>, frame: u32, len: u32) -> Result<(), PeerFault> {
        e.sent += len as usize;
        let completion = Completion {
            kind: kind::FRAME,
            flags: flag::MORE,
            slot: e.call.slot,
            generation: e.call.generation,
            len,
            frame,
            ..Completion::default()
        };
        self.push(e.ring, &completion)
    }

    /// Sends what the window did not hold as far as there is room; says what is waited for if that is not far enough.
    fn send_spilled<S>(
        &mut self,
        e: &mut Exchange<S>,
        free: &mut u64,
        bench: &mut Bench<'_, S>,
    ) -> Result<Option<Next>, PeerFault> {
        while e.has_spilled() {
            if e.filled == e.window.capacity {
                if *free == 0 {
                    return Ok(Some(Next::WantsSpace));
                }
                self.send_frame(e)?;
                *free -= 1;
            }
            if e.window.credit() == 0 {
                return Ok(Some(Next::Waits));
            }
            let room = (e.window.capacity - e.filled) as usize;
            let part = &e.spill[e.spilled..];
            let part = &part[..part.len().min(room)];
            self.lane().common.payload.write(e.offset() + e.filled as usize, part);
            bench.metrics.bytes_out += part.len() as u64;
            e.filled += part.len() as u32;
            e.spilled += part.len();
        }
        e.spill.clear();
        e.spilled = 0;
        Ok(None)
    }

    /// The frame at the head has been taken: its slot is the client's again.
    fn frame_taken<S>(&mut self, e: &mut Exchange<S>) {
        let Some(frame) = e.parked.pop_front() else { return };
        e.kept = Vec::new();
        if !e.is_shared(&frame) {
            self.lane_mut().give_back_payload(frame.slot);
        }
        e.taken = e.taken.wrapping_add(1);
        e.moved = true;
        kill_point!("server.frame.taken");
        let word = ServerWord { generation: e.call.generation, taken: e.taken };
        if let Some(shared) = self.lane().common.server_words.get(e.call.slot as usize) {
            word.publish(shared);
        }
    }

    fn pass_empty_frames<S>(&mut self, e: &mut Exchange<S>) {
        while e.parked.front().is_some_and(|frame| frame.at == frame.len) {
            self.frame_taken(e);
        }
    }

    /// Copies the frame at the head to the body that is put together.
    fn put_together<S>(&mut self, e: &mut Exchange<S>, bench: &mut Bench<'_, S>) {
        let (Work::Whole(body), Some(frame)) = (&mut e.work, e.parked.front()) else { return };
        let len = (frame.len - frame.at) as usize;
        let most = body.reserved;
        let Some(room) = body.grow(len) else {
            // Of unknown length, and longer than its handler takes.
            e.terminal = Some(Terminal { status: Status::TooLarge, detail: most as u64 });
            return;
        };
        self.lane().common.payload.read(LaneLayout::slot_offset(frame.slot) + frame.at as usize, room);
        bench.metrics.bytes_in += len as u64;
        self.frame_taken(e);
    }

    /// Runs the handler of a body that has been put together.
    fn run_whole<S>(&mut self, index: u32, e: &mut Exchange<S>, bench: &mut Bench<'_, S>) {
        if bench.timing.is_on() {
            bench.timing.runs(e.call.message_type, e.call.connection, (bench.now_ns)());
        }
        let Work::Whole(body) = std::mem::replace(&mut e.work, Work::Answered) else { return };
        match bench.handlers.get(e.call.message_type as usize) {
            Some(Entry { whole: Some(handler), .. }) => self.run_handler(*handler, body.bytes(), e, bench),
            Some(Entry { deferred: Some(defer), .. }) => {
                let deferral = catch_unwind(AssertUnwindSafe(|| defer(e.call.codec, body.bytes())));
                self.settle(index, e, deferral, bench);
            }
            Some(Entry { elsewhere: Some(elsewhere), .. }) => {
                self.run_elsewhere(index, *elsewhere, body.bytes(), e, bench);
            }
            _ => {}
        }
        bench.exchanges.give_back(body.reserved);
    }

    fn run_handler<S>(
        &mut self,
        handler: Handler<S>,
        body: &[u8],
        e: &mut Exchange<S>,
        bench: &mut Bench<'_, S>,
    ) {
        bench.pulse.runs(e.call.message_type);
        let traceparent = e.traceparent;
        let context = context(bench.state, bench.metrics, bench.totals, &e.call, traceparent.as_ref());
        prepare(bench.rest, e, 0, bench.message_max);
        let payload = &self.lane().common.payload;
        let mut reply = Reply::new(payload, e.offset(), e.window.capacity as usize, 0, bench.rest);
        let result = catch_unwind(AssertUnwindSafe(|| handler(&context, body, &mut reply)));
        reply.check_limit();
        let outcome = match result {
            Ok(Ok(())) if !reply.is_too_large() => Outcome::of(Status::Ok, 0),
            result => failure(result, &mut reply, bench.message_max),
        };
        e.filled = reply.in_slot() as u32;
        std::mem::swap(&mut e.spill, &mut bench.rest.spill);
        clean(bench.rest, bench.message_max);
        bench.metrics.bytes_out += u64::from(e.filled);
        e.terminal = Some(Terminal { status: outcome.status, detail: outcome.detail });
    }

    /// Gives the handler of a body that comes in pieces what is there, up to a frame.
    fn give_piece<S>(
        &mut self,
        e: &mut Exchange<S>,
        free: u64,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        let frames = e.window.credit().saturating_sub(1).min(free as u32);
        let room = (e.window.capacity - e.filled + frames * e.window.capacity) as usize;
        let (offset, there) = match e.parked.front() {
            Some(frame) => {
                (LaneLayout::slot_offset(frame.slot) + frame.at as usize, (frame.len - frame.at) as usize)
            }
            None => (0, 0),
        };
        let given = there.min(room.max(SLOT_SMALL));
        let last = e.ended && e.parked.len() <= 1 && given == there;
        bench.pulse.runs(e.call.message_type);
        let traceparent = e.traceparent;
        let context = context(bench.state, bench.metrics, bench.totals, &e.call, traceparent.as_ref());
        // Copied once: a byte that the handler has taken is never looked at again (S3, F15).
        let shared = e.parked.front().is_some_and(|frame| frame.slot == e.window.first);
        let all = bench.staging.take(if shared { there } else { given });
        let payload = &self.lane().common.payload;
        match e.kept.len().checked_sub(there) {
            Some(from) if there > 0 => all.copy_from_slice(&e.kept[from..][..all.len()]),
            _ => payload.read(offset, all),
        }
        let bytes = &all[..given];
        prepare(bench.rest, e, frames, bench.message_max);
        let capacity = e.window.capacity as usize;
        let Work::Pieces(pieces) = &mut e.work else { return Ok(()) };
        let filled = e.filled as usize;
        let first_frame = e.window.frame;
        let offset = LaneLayout::slot_offset(e.window.slot(first_frame));
        let mut reply = Reply::new(payload, offset, capacity, filled, bench.rest);
        let result = catch_unwind(AssertUnwindSafe(|| pieces.take(&context, bytes, last, &mut reply)));
        let written = reply.len().saturating_sub(filled);
        reply.check_limit();
        let end = match result {
            _ if reply.is_too_large() => Some(failure(result, &mut reply, bench.message_max)),
            Ok(Ok(Progress::Done)) => {
                bench.metrics.bytes_in += given as u64;
                Some(Outcome::of(Status::Ok, 0))
            }
            Ok(Ok(Progress::Took(taken))) => match wrong_progress(taken, given, written) {
                None => {
                    if let Some(frame) = e.parked.front_mut() {
                        frame.at += taken as u32;
                        if shared && taken < there && e.kept.is_empty() {
                            e.kept.extend_from_slice(&all[taken..]);
                        }
                    }
                    bench.metrics.bytes_in += taken as u64;
                    None
                }
                Some(text) => {
                    let error: Result<(), HandlerError> = Err(HandlerError::Failed(text.to_owned()));
                    Some(failure(Ok(error), &mut reply, bench.message_max))
                }
            },
            result => Some(failure(result, &mut reply, bench.message_max)),
        };
        e.filled = reply.in_slot() as u32;
        let (full, frame) = (bench.rest.full, bench.rest.window.frame);
        if bench.rest.used && !bench.rest.spill.is_empty() {
            std::mem::swap(&mut e.spill, &mut bench.rest.spill);
        }
        clean(bench.rest, bench.message_max);
        let in_frames = full as usize * capacity + e.filled as usize;
        bench.metrics.bytes_out += in_frames.saturating_sub(filled) as u64;
        for i in 0..full {
            self.push_frame(e, first_frame.wrapping_add(i), capacity as u32)?;
        }
        if full > 0 {
            e.window.frame = frame;
        }
        self.pass_empty_frames(e);
        if let Some(outcome) = end {
            e.work = Work::Answered;
            e.terminal = Some(Terminal { status: outcome.status, detail: outcome.detail });
        }
        Ok(())
    }

    /// A handler that could not be made: says why in the answer.
    fn fail<S>(
        &mut self,
        e: &mut Exchange<S>,
        result: std::thread::Result<Result<(), HandlerError>>,
        bench: &mut Bench<'_, S>,
    ) {
        prepare(bench.rest, e, 0, bench.message_max);
        let payload = &self.lane().common.payload;
        let mut reply = Reply::new(payload, e.offset(), e.window.capacity as usize, 0, bench.rest);
        let outcome = failure(result, &mut reply, bench.message_max);
        e.filled = reply.in_slot() as u32;
        clean(bench.rest, bench.message_max);
        e.work = Work::Answered;
        e.terminal = Some(Terminal { status: outcome.status, detail: outcome.detail });
    }

    /// Ends an exchange before its answer is complete; what has not been sent is dropped.
    pub(super) fn end_early<S>(
        &mut self,
        index: u32,
        status: Status,
        detail: u64,
        bench: &mut Bench<'_, S>,
    ) -> Result<(), PeerFault> {
        if let Some(exchange) = bench.exchanges.get_mut(index) {
            exchange.filled = 0;
        }
        self.end(index, Terminal { status, detail }, bench)
    }

    /// Ends an exchange: its slots are the client's again, its terminal completion is published.
    fn end<S>(&mut self, index: u32, terminal: Terminal, bench: &mut Bench<'_, S>) -> Result<(), PeerFault> {
        let Some(mut e) = bench.exchanges.take(index) else { return Ok(()) };
        let call = e.call;
        for slot in e.window_slots() {
            self.lane_mut().give_back_payload(slot);
        }
        while let Some(frame) = e.parked.pop_front() {
            if !e.is_shared(&frame) {
                self.lane_mut().give_back_payload(frame.slot);
            }
        }
        if let Some(all) = &mut self.exchanges {
            all.remove(call.slot, e.ring, index);
            all.unread -= e.unread;
        }
        let (ring, frame, len) = (e.ring, e.window.frame, e.filled);
        if e.began_ns != 0 {
            let ended_ns = (bench.now_ns)();
            let took = ended_ns.saturating_sub(e.began_ns);
            if call.connection == bench.trace.connection() {
                bench.trace.note(TracedCall {
                    session: e.seat,
                    connection: call.connection,
                    reactor: bench.reactor,
                    message_type: call.message_type,
                    slot: call.slot,
                    generation: call.generation,
                    long: true,
                    began_ns: e.began_ns,
                    ended_ns,
                    status: terminal.status as u8,
                    received: e.received.max(u64::from(call.len)),
                    sent: (e.sent + len as usize) as u64,
                });
            }
            bench.timing.count_long(call.message_type, took);
            // Its first frame was counted when it came.
            let received = e.received.saturating_sub(u64::from(call.len));
            bench.connections.add(e.seat, call.connection, took, received + (e.sent + len as usize) as u64);
        }
        bench.exchanges.end(index, e);
        bench.metrics.count_call(terminal.status);
        kill_point!("server.exchange.ended");
        self.use_terminal(ring);
        self.lane_mut().slots.give_back(call.slot);
        let completion = Completion {
            kind: kind::REPLY,
            status: terminal.status as u8,
            flags: flag::END,
            slot: call.slot,
            generation: call.generation,
            len,
            frame,
            detail: terminal.detail,
        };
        self.push(ring, &completion)
    }
}

/// How the body of a call is to be taken, or why it is not.
fn plan<S>(call: &Submission, bench: &Bench<'_, S>) -> Result<Plan<S>, Outcome> {
    let entry = bench.handlers.get(call.message_type as usize);
    match entry {
        Some(Entry { pieces: Some(make), .. }) => Ok(Plan::Pieces(*make)),
        Some(Entry { deferred: Some(defer), .. }) if call.flags & flag::END != 0 => {
            Ok(Plan::Deferred(*defer))
        }
        Some(Entry { elsewhere: Some(elsewhere), .. }) if call.flags & flag::END != 0 => {
            Ok(Plan::Elsewhere(*elsewhere))
        }
        Some(
            Entry { whole: Some(_), whole_max, .. }
            | Entry { deferred: Some(_), whole_max, .. }
            | Entry { elsewhere: Some(_), whole_max, .. },
        ) => {
            let most = (*whole_max).min(bench.message_max);
            if call.body_len > most as u64 {
                return Err(Outcome::of(Status::TooLarge, most as u64));
            }
            Ok(Plan::Whole(most))
        }
        _ => Err(Outcome::of(Status::UnknownType, call.message_type.into())),
    }
}

pub(super) fn window(call: &Submission, places: Places) -> Window {
    Window {
        first: call.response_slot,
        count: places.count,
        capacity: places.capacity,
        frame: 0,
        released: 0,
    }
}

fn context<'a, S>(
    state: &'a S,
    metrics: &'a Counters,
    totals: &'a Totals,
    call: &Submission,
    traceparent: Option<&'a TraceParent>,
) -> Context<'a, S> {
    Context {
        state,
        metrics,
        totals,
        message_type: MessageType(call.message_type),
        connection: call.connection,
        codec: call.codec,
        traceparent,
    }
}

/// Readies the rest for a reply that may go on in `frames` more frames of the window.
fn prepare<S>(rest: &mut Rest, e: &Exchange<S>, frames: u32, message_max: usize) {
    rest.window = e.window;
    rest.frames = frames;
    rest.limit = message_max.saturating_sub(e.sent);
}

fn clean(rest: &mut Rest, message_max: usize) {
    let mut spill = std::mem::take(&mut rest.spill);
    spill.clear();
    *rest = Rest { spill, limit: message_max, ..Rest::default() };
}

/// What is wrong with the progress that a handler reports, if anything.
fn wrong_progress(taken: usize, given: usize, written: usize) -> Option<&'static str> {
    if taken > given {
        return Some("the handler took more bytes than it was given");
    }
    let stuck = taken == 0 && written == 0;
    stuck.then_some("the handler neither took nor wrote anything although there was room")
}

/// Refuses a FRAME that says more than it may.
fn check_frame(entry: &Submission) -> Result<(), PeerFault> {
    let ends = entry.flags & (flag::MORE | flag::END);
    let others = entry.flags & !(flag::MORE | flag::END | flag::LEASED | flag::HANDOFF);
    if (ends != flag::MORE && ends != flag::END) || others != 0 {
        return Err(PeerFault::Reserved { word: 0, value: entry.flags.into() });
    }
    let numbers = [
        u64::from(entry.codec),
        entry.message_type.into(),
        entry.connection.into(),
        entry.meta_len.into(),
        entry.response_count.into(),
        entry.response_slot.into(),
        entry.body_len,
        entry.deadline,
    ];
    match numbers.iter().find(|n| **n != 0) {
        Some(value) => Err(PeerFault::Reserved { word: 1, value: *value }),
        None => Ok(()),
    }
}
