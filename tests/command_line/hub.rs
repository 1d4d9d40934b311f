//! Models and data by name, from a server on this machine that answers as the Hub does.

use crate::support::Place;
use serde_json::json;
use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "secret";

/// Files by their path in a repository, repositories by their name, as in URLs.
type Repos = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// A Hub whose repositories in `private/` need a token.
struct Hub {
    address: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(repos: Repos) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        // Ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (repos, log) = (repos.clone(), Arc::clone(&log));
                thread::spawn(move || answer(stream.unwrap(), &repos, &log));
            }
        });
        Hub { address, asked }
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn answer(mut stream: TcpStream, repos: &Repos, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
    log.lock().unwrap().push(path.clone());
    let header = |name: &str| headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let plain =
        |status: &str| format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes();
    let allowed = !path.contains("private/") || header("authorization") == Some(&format!("bearer {TOKEN}"));
    let info = path.strip_prefix("/api/").and_then(|rest| rest.split_once("/revision/"));
    let reply = if !allowed {
        plain("401 Unauthorized")
    } else if let Some((repo, revision)) = info {
        let repo = repo.strip_prefix("models/").unwrap_or(repo);
        match repos.get(repo).filter(|_| ["main", "v1"].contains(&revision)) {
            None => plain("404 Not Found"),
            Some(files) => {
                let siblings: Vec<_> = files.keys().map(|name| json!({ "rfilename": name })).collect();
                let body = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
                let length = body.len();
                format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}").into_bytes()
            }
        }
    } else {
        let (repo, file) = path.strip_prefix('/')?.split_once(&format!("/resolve/{COMMIT}/"))?;
        let bytes = &repos[repo][file];
        let (start, end) = header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        let start: usize = start.parse().unwrap();
        let end = end.parse().map_or(bytes.len(), |end: usize| end + 1).min(bytes.len());
        let (size, part) = (bytes.len(), &bytes[start..end]);
        let tag = format!("{:x}", file.bytes().fold(size, |sum, byte| sum * 31 % 1_000_003 + usize::from(byte)));
        let (last, length) = (end - 1, part.len());
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{last}/{size}\r\nContent-Length: {length}\r\n\
             ETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}\r\nConnection: close\r\n\r\n"
        );
        [head.as_bytes(), part].concat()
    };
    stream.write_all(&reply).ok()
}

/// The files of a folder of `place`.
fn files(place: &Place, folder: &str) -> BTreeMap<String, Vec<u8>> {
    let root = place.path(folder);
    let found = place
        .contents()
        .into_iter()
        .filter_map(|(path, bytes)| Some((path.strip_prefix(&root).ok()?.to_str()?.to_owned(), bytes?)));
    found.collect()
}

#[test]
fn models_and_data_are_fetched_by_name_once() {
    let place = Place::new();
    place.model_with_text();
    let model = files(&place, "texts");
    let rows = |word: &str| format!("{{\"prompt\":\"{word}\",\"completion\":\"b\"}}\n").repeat(3).into_bytes();
    let split = BTreeMap::from([
        ("README.md".to_owned(), b"read me".to_vec()),
        ("data/train-0.jsonl".to_owned(), rows("train")),
        ("data/test-0.jsonl".to_owned(), rows("test")),
    ]);
    let parts = ["data/train-0.jsonl", "data/train-1.jsonl"].map(|name| (name.to_owned(), rows("train")));
    let gguf = BTreeMap::from([("a.Q4_0.gguf".to_owned(), b"GGUF".to_vec())]);
    let hub = Hub::start(BTreeMap::from([
        ("org/model".to_owned(), model.clone()),
        ("private/model".to_owned(), model),
        ("org/gguf".to_owned(), gguf),
        ("datasets/org/rows".to_owned(), split),
        ("datasets/org/parts".to_owned(), BTreeMap::from(parts)),
    ]));
    // Its own folder, so that the cache does not count as a change on disk where nothing may change.
    let home = Place::new();
    let (home, endpoint) = (home.path("hf"), hub.address.clone());
    let run = |variables: &[(&str, &str)], args: &[&str]| {
        let mut command = place.command(args);
        command.env_remove("HF_TOKEN").env_remove("HF_HUB_CACHE").env_remove("HF_HUB_OFFLINE");
        command.env("HF_HOME", &home).env("HF_ENDPOINT", &endpoint).envs(variables.iter().copied());
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let usual = ["--steps", "2", "--batch-size", "1", "--grad-accum", "1", "--rank", "2", "--lr", "1e-3"];
    let train = |variables: &[(&str, &str)], args: &[&str]| run(variables, &[&usual[..], args].concat());
    let by_name = ["--model", "org/model", "--data", "org/rows", "--eval-data", "org/rows"];
    // A plan needs no weights.
    let (code, table, printed) = run(&[], &["plan", "--model", "org/model", "--device", "cpu"]);
    assert_eq!(code, 0, "{printed}");
    assert!(table.contains("Fastest that fits") && !printed.contains("model.safetensors"), "{printed}");
    let (code, _, printed) = train(&[], &[&by_name[..], &["--out", "named"]].concat());
    assert_eq!(code, 0, "{printed}");
    assert!(printed.contains("fetching org/model/model.safetensors"), "{printed}");
    assert!(!printed.contains("README"), "{printed}");
    // Steps are timed on all files of a data set.
    let timed = [
        "bench-step",
        "--model",
        "org/model",
        "--data",
        "org/parts",
        "--batch-size",
        "6",
        "--warm",
        "0",
        "--timed",
        "1",
    ];
    let (code, found, printed) = run(&[], &[&timed[..], &["--json", "--device", "cpu"]].concat());
    assert!(code == 0 && found.contains(r#""batch_size":6,"#), "{found}{printed}");
    // The same as from the files themselves.
    place.write("train.jsonl", rows("train"));
    place.write("test.jsonl", rows("test"));
    let here = ["--model", "texts", "--data", "train.jsonl", "--eval-data", "test.jsonl", "--out", "here"];
    let (code, _, printed) = train(&[], &here);
    assert_eq!(code, 0, "{printed}");
    assert_eq!(place.adapter("named"), place.adapter("here"));
    assert_eq!(
        place.read("named/summary.json").split("seconds").next(),
        place.read("here/summary.json").split("seconds").next()
    );
    let config = place.read("named/adapter/adapter_config.json");
    assert!(config.contains("\"org/model\"") && place.read("named/settings.toml").contains("data = \"org/rows\""));

    // What is there is not fetched again: two questions what the names stand for, and nothing more.
    let asked = hub.asked();
    let (code, shown, printed) =
        train(&[], &["--model", "org/model", "--data", "org/rows@v1/data/test-0.jsonl", "--show-batch"]);
    assert!(code == 0 && shown.contains("test") && !printed.contains("fetching"), "{printed}");
    assert_eq!(hub.asked(), asked + 2);
    // Without the Hub too.
    for variables in [[("HF_HUB_OFFLINE", "1")], [("HF_ENDPOINT", "http://127.0.0.1:1")]] {
        let (code, shown, printed) = train(&variables, &["--model", "org/model", "--data", "org/rows", "--show-batch"]);
        assert!(code == 0 && shown.contains("train") && printed.contains("as fetched before"), "{printed}");
        let (code, _, printed) = train(&variables, &["--model", "org/other", "--data", "org/rows"]);
        let words = if variables[0].1 == "1" { "was not fetched yet, and HF_HUB_OFFLINE" } else { "cannot be reached" };
        assert!(code == 1 && printed.contains(words) && printed.contains("org/other"), "{printed}");
    }
    assert_eq!(hub.asked(), asked + 2);

    let refused = |model: &str, data: &str, words: &[&str]| {
        let (code, _, printed) = train(&[], &["--model", model, "--data", data, "--out", "refused"]);
        assert!(code == 1 && words.iter().all(|word| printed.contains(word)), "{printed}");
        assert!(!place.path("refused").exists());
    };
    refused("org/none", "train.jsonl", &["there is no org/none (revision main)", "no such path on this machine"]);
    refused("org/model@v9", "train.jsonl", &["there is no org/model (revision v9)"]);
    refused("private/model", "train.jsonl", &["private/model", "hf auth login", "HF_TOKEN"]);
    refused("org/gguf", "train.jsonl", &["--model org/gguf/a.Q4_0.gguf"]);
    refused("texts", "org/none", &["there is no org/none"]);
    refused("texts", "org/rows/validation", &["no data at validation", "data/train-0.jsonl"]);
    let (code, _, printed) =
        train(&[("HF_TOKEN", TOKEN)], &["--model", "private/model", "--data", "train.jsonl", "--out", "private"]);
    assert_eq!(code, 0, "{printed}");
}
