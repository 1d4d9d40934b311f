//! Kinds of data files: the same rows give the same examples, whatever file they come in.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use nibble::data::{DataOptions, DataSpec, Example, Examples, Result, load_examples};
use nibble_models::tokenizer::Tokenizer;
use proptest::prelude::*;
use tempfile::TempDir;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn golden(name: &str) -> PathBuf {
    Path::new("tests/golden/data").join(name)
}

/// The embedded model's tokenizer with a chat template.
fn tokenizer() -> Tokenizer {
    let path = Path::new("assets/default/model");
    Tokenizer::from_folder(path).unwrap().with_chat_template(CHATML)
}

fn options() -> DataOptions {
    DataOptions { seq_len: 512, vocab_size: 768, ..DataOptions::default() }
}

fn read(spec: &DataSpec, options: &DataOptions) -> Result<Examples> {
    load_examples(spec, Some(&tokenizer()), options)
}

fn all(examples: &Examples) -> Vec<Example> {
    examples.iter().collect::<Result<_>>().unwrap()
}

fn load(path: &Path) -> Vec<Example> {
    all(&read(&path.to_path_buf().into(), &options()).unwrap())
}

fn refused(path: &Path) -> String {
    read(&path.to_path_buf().into(), &options()).unwrap_err().to_string()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// A temporary folder with files.
fn place(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

#[test]
fn parquet_and_csv_of_other_programs_are_read_as_the_same_rows_in_jsonl() {
    // Written by pyarrow: snappy, zstd, zstd in pages of version 2, none; two rows a group.
    for name in ["messages", "sharegpt", "instructions", "ids"] {
        let expected = load(&golden(&format!("{name}.jsonl")));
        assert!(expected.len() > 1);
        assert_eq!(load(&golden(&format!("{name}.parquet"))), expected, "{name}");
    }
    assert_eq!(load(&golden("instructions.csv")), load(&golden("instructions.jsonl")));
}

#[test]
fn share_gpt_is_a_conversation_with_other_names() {
    let rows = fs::read_to_string(golden("sharegpt.jsonl")).unwrap();
    let renamed = rows.replace("conversations", "messages").replace("from", "role").replace("value", "content");
    let renamed = renamed.replace("human", "user").replace("gpt", "assistant");
    let dir = place(&[("rows.jsonl", renamed.as_bytes())]);
    assert_eq!(load(&dir.path().join("rows.jsonl")), load(&golden("sharegpt.jsonl")));
}

#[test]
fn compression_and_lists_and_folders_change_nothing() {
    let rows = fs::read_to_string(golden("messages.jsonl")).unwrap();
    let expected = load(&golden("messages.jsonl"));
    let list = format!("\u{feff} [\n{}]", rows.trim().replace("}\n{", "}\n, {"));
    let zst = zstd::encode_all(rows.as_bytes(), 1).unwrap();
    // Two members after each other are one file, as `cat a.gz b.gz` makes it.
    let (half, rest) = rows.split_at(rows.find('\n').unwrap() + 1);
    let members = [gz(half.as_bytes()), gz(rest.as_bytes())].concat();
    let dir = place(&[
        ("a.jsonl.gz", &members),
        ("b.jsonl.zst", &zst),
        ("c.json", list.as_bytes()),
        ("inner/d.json.gz", &gz(list.as_bytes())),
        ("inner/e.ndjson", rows.replace('\n', "\r\n\r\n").as_bytes()),
        ("README.md", b"no data"),
    ]);
    for name in ["a.jsonl.gz", "b.jsonl.zst", "c.json", "inner/d.json.gz", "inner/e.ndjson"] {
        assert_eq!(load(&dir.path().join(name)), expected, "{name}");
    }
    assert_eq!(load(dir.path()), [&expected[..]; 5].concat());
}

#[test]
fn tables_have_lists_as_json_and_tabs_where_the_name_says_so() {
    let dir = place(&[
        ("ids.csv", b"input_ids,labels,note\n\"[1,2,3]\",\"[-100, 2, 7]\",x\n"),
        ("rows.tsv", "\u{feff}prompt\tcompletion\n\"a, \"\"b\"\"\"\tc\n".as_bytes()),
        ("same.jsonl", br#"{"prompt":"a, \"b\"","completion":"c"}"#),
    ]);
    let ids = load(&dir.path().join("ids.csv"));
    assert_eq!(ids, [Example { ids: vec![1, 2, 3], labels: vec![-100, 2, 7] }]);
    assert_eq!(load(&dir.path().join("rows.tsv")), load(&dir.path().join("same.jsonl")));
}

#[test]
fn a_format_can_be_asked_for() {
    let dir = place(&[("rows.jsonl", br#"{"prompt":"a","completion":"b","text":"tt"}"#)]);
    let spec = dir.path().join("rows.jsonl").into();
    let text = read(&spec, &DataOptions { format: Some("text".parse().unwrap()), ..options() }).unwrap();
    assert!(all(&text)[0].labels.iter().all(|&label| label >= 0));
    assert_eq!(text.known().forms, [r#"{"text"}"#]);
    let asked = DataOptions { format: Some("messages".parse().unwrap()), ..options() };
    let error = read(&spec, &asked).unwrap_err().to_string();
    assert!(error.contains(r#"rows.jsonl:1: has no "messages""#) && error.contains("--format"), "{error}");
    assert!("chatml".parse::<nibble::data::Format>().unwrap_err().contains("sharegpt"));
}

#[test]
fn bad_rows_are_left_out_and_counted_if_asked() {
    let rows = b"{\"what\":1}\n{\"text\":\"ab\"}\n{\"text\":\nnull\n{\"text\":\"\"}\n{\"text\":\"cd\"}\n";
    let table = b"text,n\nab,1\ncd\n\xff,2\ncd,3\n";
    let dir = place(&[("rows.jsonl", rows), ("table.csv", table)]);
    let skipping = DataOptions { skip_bad_rows: true, ..options() };
    for (name, skipped, first) in [("rows.jsonl", 4, "rows.jsonl:1: "), ("table.csv", 2, "table.csv:3: 1 val")] {
        let spec: DataSpec = dir.path().join(name).into();
        assert!(read(&spec, &options()).unwrap_err().to_string().contains(first), "{name}");
        let examples = read(&spec, &skipping).unwrap();
        assert_eq!(examples.len(), 2, "{name}");
        assert_eq!(examples.known().skipped, skipped, "{name}");
        let found = examples.known().first_skipped.clone().unwrap();
        assert!(found.contains(first), "{found}");
    }
    let dir = place(&[("bad.jsonl", b"1\n2\n")]);
    let error = read(&dir.path().join("bad.jsonl").into(), &skipping).unwrap_err().to_string();
    assert!(error.contains("no examples") && error.contains("2 rows were left out, the first: "), "{error}");
}

#[test]
fn what_is_mostly_a_mistake_is_counted() {
    let tokenizer = tokenizer();
    let bos = tokenizer.bos().unwrap();
    let ids = format!("{{\"input_ids\":[{bos},{bos},5]}}\n{{\"input_ids\":[5,6,{}]}}\n", tokenizer.eos().unwrap());
    let long = format!("{{\"prompt\":\"a\",\"completion\":\"{}\"}}\n", "b ".repeat(600));
    let dir = place(&[("ids.jsonl", ids.as_bytes()), ("long.jsonl", long.as_bytes())]);
    let notes = |name: &str| read(&dir.path().join(name).into(), &options()).unwrap().known().notes;
    let found = notes("ids.jsonl");
    assert_eq!((found.double_bos, found.endless, found.truncated), (1, 1, 0));
    let found = notes("long.jsonl");
    // It had an end before it was cut: being cut is what is wrong.
    assert_eq!((found.double_bos, found.endless, found.truncated), (0, 0, 1));
    for (template, learned) in [(CHATML.to_owned(), 0), (CHATML.replace("{{ '<|im_start|>assistant\n' }}", ""), 4)] {
        let tokenizer = tokenizer.clone().with_chat_template(template);
        let examples = load_examples(&golden("messages.jsonl").into(), Some(&tokenizer), &options()).unwrap();
        assert_eq!(examples.known().notes.header_learned, learned);
    }
}

#[test]
fn damaged_files_are_errors_also_where_bad_rows_are_left_out() {
    let rows = fs::read(golden("messages.jsonl")).unwrap().repeat(40);
    let (gz, zst) = (gz(&rows), zstd::encode_all(&rows[..], 1).unwrap());
    let parquet = fs::read(golden("messages.parquet")).unwrap();
    let dir = place(&[
        ("cut.jsonl.gz", &gz[..gz.len() - 9]),
        ("cut.jsonl.zst", &zst[..zst.len() - 9]),
        ("cut.json", b"[{\"text\":\"ab\"},"),
        ("cut.parquet", &parquet[..parquet.len() - 9]),
        ("no.parquet", b"PAR1"),
        ("no.jsonl.gz", b"{}"),
    ]);
    for name in ["cut.jsonl.gz", "cut.jsonl.zst", "cut.json", "cut.parquet", "no.parquet", "no.jsonl.gz"] {
        let path = dir.path().join(name);
        assert!(refused(&path).contains(name), "{name}");
        let skipping = DataOptions { skip_bad_rows: true, ..options() };
        let error = read(&path.clone().into(), &skipping).unwrap_err().to_string();
        assert!(error.contains(name) && !error.contains("left out"), "{error}");
    }
}

/// 17 MiB of tokens, which is more than is held in memory.
fn many_ids() -> Vec<u8> {
    let row =
        |i: usize| format!("{{\"input_ids\":{:?}}}\n", (0..60).map(|j| (i * 31 + j * 7) % 768).collect::<Vec<_>>());
    (0..75_000).flat_map(|i| row(i).into_bytes()).collect()
}

#[test]
fn many_examples_are_found_in_the_cache() {
    let dir = place(&[("ids.jsonl", &many_ids())]);
    let spec: DataSpec = dir.path().join("ids.jsonl").into();
    let cache = dir.path().join("cache");
    let options = DataOptions { cache: Some(cache.clone()), ..options() };
    let kept = || fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let first = read(&spec, &options).unwrap();
    assert_eq!(kept().len(), 1);
    // What the cache holds is used, and not made again: this one says something else.
    let file = kept().remove(0);
    let bytes = fs::read(&file).unwrap();
    let mut changed = bytes.clone();
    changed[0] ^= 1;
    fs::write(&file, &changed).unwrap();
    let second = read(&spec, &options).unwrap();
    assert_ne!(second.get(0).unwrap(), first.get(1).unwrap());
    assert_eq!(second.get(0).unwrap().ids[0], 1);
    assert_eq!(second.known(), first.known());
    let last = 74_999;
    assert_eq!(second.get(last).unwrap().ids[59], ((last * 31 + 59 * 7) % 768) as u32);
    // One that is not whole is made again.
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_eq!(read(&spec, &options).unwrap().known(), first.known());
    assert_eq!(fs::read(&file).unwrap(), bytes);
    // Other settings, another tokenizer or another file have other examples.
    read(&spec, &DataOptions { seq_len: 59, ..options.clone() }).unwrap();
    assert_eq!(kept().len(), 2);
    load_examples(&spec, None, &options).unwrap();
    assert_eq!(kept().len(), 3);
    fs::OpenOptions::new().append(true).open(dir.path().join("ids.jsonl")).unwrap().write_all(b"\n{}").unwrap();
    assert!(read(&spec, &options).unwrap_err().to_string().contains("ids.jsonl:75002: has no \"input_ids\""));
    assert_eq!(kept().len(), 3);
}

#[test]
fn long_texts_are_read_in_pieces() {
    let text: String = (0..200_000).map(|i| format!("Lena saw {i} cups é.\n")).collect();
    assert!(text.len() > 4 << 20);
    let dir = place(&[("book.txt", text.as_bytes()), ("book.txt.gz", &gz(text.as_bytes()))]);
    let cache = Some(dir.path().join("cache"));
    let options = DataOptions { seq_len: 1000, cache, ..options() };
    let plain = read(&dir.path().join("book.txt").into(), &options).unwrap();
    let ids: Vec<u32> = plain.iter().flat_map(|example| example.unwrap().ids).collect();
    assert_eq!(tokenizer().decode(&ids, true).unwrap(), text);
    let lengths = plain.lengths().unwrap();
    assert!(lengths[..lengths.len() - 1].iter().all(|&length| length == 1000));
    let packed = read(&dir.path().join("book.txt.gz").into(), &options).unwrap();
    assert_eq!(packed.known().digest, plain.known().digest);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_parquet_never_panics(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        for name in ["messages.parquet", "instructions.parquet"] {
            let mut bytes = fs::read(golden(name)).unwrap();
            for (index, value) in &flips {
                let at = index.index(bytes.len());
                bytes[at] = *value;
            }
            let dir = place(&[("a.parquet", &bytes)]);
            let _ = read(&dir.path().join("a.parquet").into(), &options());
        }
    }

    #[test]
    fn lists_are_cut_at_their_own_commas(
        texts in prop::collection::vec(r#"[\[\]{}",\\: a]{1,20}"#, 1..6), space in "[ \n\t]{0,3}",
    ) {
        let rows: Vec<String> = texts.iter().map(|text| serde_json::json!({ "text": text, "n": [[1], {}] }).to_string()).collect();
        let list = format!("{space}[{space}{}{space}]{space}", rows.join(&format!("{space},{space}")));
        let dir = place(&[("a.json", list.as_bytes()), ("b.jsonl", rows.join("\n").as_bytes())]);
        prop_assert_eq!(load(&dir.path().join("a.json")), load(&dir.path().join("b.jsonl")));
    }

    #[test]
    fn any_bytes_under_any_name_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        name in prop::sample::select(vec!["a.json", "a.csv", "a.tsv.zst", "a.jsonl.gz", "a.parquet", "a.txt.zst", "a"]),
        list: bool,
    ) {
        let bytes = if list { [b"[", &bytes[..]].concat() } else { bytes };
        let dir = place(&[(name, &bytes)]);
        let _ = read(&dir.path().join(name).into(), &DataOptions { skip_bad_rows: true, ..options() });
    }
}
