"""The frame of the report: one page with its style inside, for light and dark screens, narrow ones and paper.

The placeholders are filled with HTML that is escaped already; braces of the style sheet are doubled.
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e2e6ee; --page: #f6f7fa;
  --card: #fff;
  --c0: #3366cc; --c1: #e07a1f; --c2: #2a9d6f; --c3: #a44fc4; --c4: #c9304f; --c5: #7a6a55;
  --pruned: #d43c3c; --promoted: #1e9e5a; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9f0; --soft: #98a2b5; --line: #2c3443;
  --page: #12161e; --card: #1a202b; --c0: #7ba4ff; --c1: #f2a35e; --c2: #5fd0a2; --c3: #cf93ea; --c4: #f27a92;
  --c5: #bba98f;
  --pruned: #ff7b7b; --promoted: #58d794; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }}
main, header {{ max-width: 1120px; margin: 0 auto; padding: 0 20px; }}
header {{ padding-top: 28px; }}
h1 {{ font-size: 24px; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 17px; margin: 0 0 12px; }}
nav {{ display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 20px; font-size: 13px; }}
nav a {{ color: var(--c0); text-decoration: none; }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-bottom: 16px; }}
.state, .note, small, .none {{ color: var(--soft); font-size: 13px; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }}
.tile {{ border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }}
.tile b {{ display: block; font-size: 22px; font-variant-numeric: tabular-nums; }}
.tile small {{ display: block; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }}
.maps {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 12px;
  margin-top: 12px; }}
figure {{ margin: 0 0 14px; }}
figcaption {{ font-size: 13px; margin-bottom: 4px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 6px 0 10px;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 3px 14px 3px 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ color: var(--soft); font-weight: 600; }}
#rejected-replies td:last-child, #warnings td:last-child, #configuration td {{ text-align: left; white-space: pre-wrap;
  overflow-wrap: anywhere; }}
summary {{ cursor: pointer; color: var(--c0); font-size: 13px; }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font: 11px system-ui, sans-serif; fill: var(--soft); }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; margin-bottom: 6px; }}
.legend i {{ display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }}
.grid {{ stroke: var(--line); fill: none; }}
.line, .arc {{ fill: none; stroke-width: 2; }}
.line.again {{ stroke-dasharray: 5 4; }} i.again {{ opacity: 0.5; }}
.arc {{ stroke: var(--c0); stroke-width: 1.2; }}
.pruned {{ stroke: var(--pruned); stroke-width: 2; stroke-dasharray: 4 3; }}
.promoted {{ stroke: var(--promoted); stroke-width: 2.4; }}
.node {{ fill: var(--soft); }} .root {{ fill: var(--c1); }}
.frame {{ fill: none; stroke: var(--line); }}
.rootkey {{ background: var(--c1); }} .prunedkey {{ background: var(--pruned); }}
.promotedkey {{ background: var(--promoted); }}
.c0 {{ fill: var(--c0); background: var(--c0); }} .line.c0 {{ fill: none; stroke: var(--c0); }}
.c1 {{ fill: var(--c1); background: var(--c1); }} .line.c1 {{ fill: none; stroke: var(--c1); }}
.c2 {{ fill: var(--c2); background: var(--c2); }} .line.c2 {{ fill: none; stroke: var(--c2); }}
.c3 {{ fill: var(--c3); background: var(--c3); }} .line.c3 {{ fill: none; stroke: var(--c3); }}
.c4 {{ fill: var(--c4); background: var(--c4); }} .line.c4 {{ fill: none; stroke: var(--c4); }}
.c5 {{ fill: var(--c5); background: var(--c5); }} .line.c5 {{ fill: none; stroke: var(--c5); }}
@media print {{ section {{ break-inside: avoid; }} nav {{ display: none; }} }}
</style>
</head>
<body>
<header><h1>{title}</h1><div class="state">{state}</div><nav>{links}</nav></header>
<main>{body}</main>
</body>
</html>
"""
