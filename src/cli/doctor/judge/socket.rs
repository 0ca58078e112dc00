//! The socket path, and the server that was tried.

use super::super::check::{Check, Verdict};
use super::super::findings::{Findings, Place, Socket, Trial};
use super::time;

pub fn checks(findings: &Findings) -> Vec<Check> {
    let path = findings.asked.socket.display().to_string();
    vec![directory(&findings.socket, &path), server(&findings.socket, &path), trial(&findings.trial)]
}

fn directory(socket: &Socket, path: &str) -> Check {
    let why =
        "the socket lies where nobody else can replace it: in a directory of its user's own, or a sticky one";
    let check = |found: String| {
        let directory = socket.directory.as_ref();
        Check::ok("socket.directory", why, found)
            .fact("path", path)
            .fact("owner", directory.map(|of| of.uid))
            .fact("mode", directory.map(|of| format!("{:04o}", of.mode)))
    };
    if !socket.has_proc {
        let advice =
            "mount /proc: a server reaches its socket through /proc/self/fd, which no link can redirect";
        return check("there is no /proc".to_owned()).but(Verdict::Failure, advice);
    }
    let found = match &socket.directory {
        Some(of) => format!("{path}, its directory belongs to uid {} with mode {:04o}", of.uid, of.mode),
        None => format!("{path}, its directory will be made"),
    };
    match &socket.place {
        Place::Free | Place::Answers | Place::Silent(_) => check(found),
        Place::Refused(why) => {
            let advice = "see what was found, set XDG_RUNTIME_DIR to a directory of your own, or choose another path \
                          with --socket";
            check(why.clone()).but(Verdict::Failure, advice)
        }
    }
}

fn server(socket: &Socket, path: &str) -> Check {
    let why = "clients find a server there; a second one is refused the path while the first lives";
    let check = |found: String| {
        Check::ok("socket.server", why, found).fact("answers", matches!(socket.place, Place::Answers))
    };
    match &socket.place {
        Place::Free => check(format!("none listens at {path}; one can be started")),
        Place::Answers => check(format!("one answers at {path}")),
        Place::Silent(error) => check(format!("somebody listens at {path}, but: {error}")).but(
            Verdict::Failure,
            "stop whoever listens there (fuser, ss -xlp), or choose another path with --socket",
        ),
        Place::Refused(_) => check("the path cannot be used".to_owned()).noted(),
    }
}

fn trial(trial: &Trial) -> Check {
    let why =
        "all of it together: a server on a path of its own, with every reactor, and a client that calls it";
    let check = |found: String, times: Option<(u64, u64)>| {
        Check::ok("trial.calls", why, found)
            .fact("after_pause_ns", times.map(|times| times.0))
            .fact("back_to_back_ns", times.map(|times| times.1))
    };
    match trial {
        Trial::Answered { back_to_back_ns, after_pause_ns } => check(
            format!(
                "a call of 64 bytes takes {} after a pause of 1 ms, {} without one (medians)",
                time(*after_pause_ns),
                time(*back_to_back_ns)
            ),
            Some((*after_pause_ns, *back_to_back_ns)),
        ),
        Trial::NotTried(why) => check(format!("not tried: {why}"), None).noted(),
        Trial::Failed(error) => check(error.clone(), None).but(
            Verdict::Failure,
            "see the failures above, if there are any; `doorbell serve --verbose` says more",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::findings::{Directory, fixture};
    use super::*;

    fn verdicts(place: Place) -> (Check, Check) {
        let mut findings = fixture::good();
        findings.socket.place = place;
        let mut checks = checks(&findings).into_iter();
        (checks.next().unwrap(), checks.next().unwrap())
    }

    /// Goal:   whoever has the path, and whether it can be had, are told apart.
    #[test]
    fn r3_6_a_path_is_free_or_answers_or_is_silent_or_refused() {
        let (directory, server) = verdicts(Place::Free);
        assert!(directory.verdict == Verdict::Ok && directory.found.contains("uid 1000 with mode 0700"));
        assert!(server.verdict == Verdict::Ok && server.found.contains("none listens"));
        let (directory, server) = verdicts(Place::Answers);
        assert!(directory.verdict == Verdict::Ok && server.found.contains("one answers"));
        assert_eq!((server.verdict, server.facts[0].1.as_bool()), (Verdict::Ok, Some(true)));
        let (directory, server) = verdicts(Place::Silent("it may be stuck".to_owned()));
        assert!(directory.verdict == Verdict::Ok && server.verdict == Verdict::Failure);
        assert!(server.found.contains("it may be stuck"));
        let (directory, server) = verdicts(Place::Refused("writable by others".to_owned()));
        assert_eq!((directory.verdict, server.verdict), (Verdict::Failure, Verdict::Note));
        assert!(directory.found.contains("writable by others"));
    }

    /// Goal:   a directory that is still to be made, and a machine without /proc.
    #[test]
    fn a_missing_directory_may_be_made_and_a_missing_proc_is_a_failure() {
        let mut socket = fixture::good().socket;
        socket.directory = None;
        assert!(directory(&socket, "/tmp/doorbell-7/s").found.contains("will be made"));
        socket.directory = Some(Directory { uid: 0, mode: 0o1777 });
        assert!(directory(&socket, "/tmp/s").found.contains("mode 1777"));
        socket.has_proc = false;
        assert_eq!(directory(&socket, "/tmp/s").verdict, Verdict::Failure);
    }

    /// Goal:   a server that does not answer fails; one that could not be tried says nothing.
    #[test]
    fn a_server_that_was_tried_and_failed_is_a_failure() {
        let check = trial(&Trial::Failed("creating a ring: refused".to_owned()));
        assert!(check.verdict == Verdict::Failure && check.found.contains("creating a ring"));
        assert_eq!(trial(&Trial::NotTried("mkdir /tmp/x: refused".to_owned())).verdict, Verdict::Note);
    }
}
