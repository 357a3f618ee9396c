//! Manual pages from text: what the formatter would take for its own is escaped, and chapters of the README are translated.

/// Text in which nothing means anything to the formatter.
pub(crate) fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// A section that keeps its line breaks.
pub(crate) fn verbatim(title: &str, text: &str) -> String {
    let lines = text.lines().map(|line| format!("\\&{}\n", escape(line)));
    format!(".SH {title}\n.nf\n{}.fi\n", lines.collect::<String>())
}

/// The chapter of the README with this heading, as a section.
pub(crate) fn chapter(readme: &str, heading: &str, title: &str) -> Result<String, String> {
    let start = format!("\n## {heading}\n");
    let (_, rest) = readme.split_once(&start).ok_or_else(|| format!("README.md has no chapter '{heading}'"))?;
    let chapter = rest.split("\n## ").next().unwrap_or_default();
    let mut page = format!(".SH {title}\n");
    for paragraph in chapter.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
        page += &translate(paragraph.trim_matches('\n'));
    }
    Ok(page)
}

fn translate(paragraph: &str) -> String {
    if paragraph.starts_with("    ") {
        let lines = paragraph.lines().map(|line| format!("\\&{}\n", escape(line)));
        return format!(".P\n.nf\n{}.fi\n", lines.collect::<String>());
    }
    if paragraph.starts_with('|') {
        return table(paragraph);
    }
    if let Some(title) = paragraph.strip_prefix("### ") {
        return format!(".SS {}\n", inline(title));
    }
    if let Some(first) = paragraph.strip_prefix("- ") {
        let items = first.split("\n- ").map(|item| format!(".IP \\(bu 2\n{}\n", inline(item)));
        return items.collect();
    }
    format!(".P\n{}\n", inline(paragraph))
}

/// The first column becomes a list of tags; of more than two, the others are told with their headings.
fn table(rows: &str) -> String {
    let mut rows = rows.lines().map(|row| row.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    let headings = rows.next().unwrap_or_default();
    let entry = |row: Vec<&str>| {
        let told = |(heading, cell): (&&str, &&str)| {
            if headings.len() > 2 {
                format!("{heading}: {cell}")
            } else {
                (*cell).into()
            }
        };
        let cells: Vec<String> = headings.iter().zip(&row).skip(1).map(told).collect();
        format!(".TP\n{}\n{}\n", inline(row.first().unwrap_or(&"")), inline(&cells.join("; ")))
    };
    rows.skip(1).map(entry).collect()
}

/// Code and emphasis in bold, links by their text; a line that begins like a request of the formatter does not.
fn inline(text: &str) -> String {
    let mut bold = false;
    let joined = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let parts = escape(&joined).replace("**", "`");
    let mut page = String::from("\\&");
    for (n, part) in parts.split('`').enumerate() {
        if n > 0 {
            bold = !bold;
            page += if bold { "\\fB" } else { "\\fR" };
        }
        page += part;
    }
    page
}
