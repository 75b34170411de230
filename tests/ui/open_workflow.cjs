// Opens a workflow in the page that ComfyUI serves, queues it from there, waits for its picture.
//
//   node open_workflow.cjs OPTIONS.json
//
// OPTIONS: url, workflow (a file the page saved), others (files to open and not to run), screenshot (PNG to write),
// chromium, playwright (folder), seconds.
// Prints one JSON object: nodes (type, title, whether the page knows the type, names and values of the widgets),
// status, messages and images of the run, shown (pictures the page has put on nodes), after (nodes when it has run),
// others (nodes by file), errors (raised in the page).

const fs = require('fs')

const options = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))
const { chromium } = require(options.playwright)
const patience = options.seconds * 1000

// No first-run tour over the canvas; labels drawn at every zoom.
const SETTINGS = {
  'Comfy.TutorialCompleted': true,
  'Comfy.InstalledVersion': '99.0.0',
  'Comfy.Workflow.ShowMissingModelsWarning': false,
  'LiteGraph.Canvas.MinFontSizeForLOD': 0,
}

async function openPage(browser, errors) {
  const page = await browser.newPage({ viewport: { width: 1600, height: 900 } })
  page.on('pageerror', error => errors.push(String(error)))
  // A page without internet must not wait for it.
  await page.route(url => !url.href.startsWith(options.url), route => route.abort())
  await page.request.post(options.url + '/settings', { data: SETTINGS })
  await page.goto(options.url, { waitUntil: 'domcontentloaded' })
  await page.waitForFunction(
    () => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100,
    null,
    { timeout: patience }
  )
  return page
}

// Drops the file on the canvas, as a user would.
async function dropWorkflow(page, file) {
  const text = fs.readFileSync(file, 'utf8')
  const count = JSON.parse(text).nodes.length
  const data = await page.evaluateHandle(content => {
    const transfer = new DataTransfer()
    transfer.items.add(new File([content], 'demo.json', { type: 'application/json' }))
    return transfer
  }, text)
  await page.evaluate(() => window.app.graph.clear())
  for (const event of ['dragover', 'drop']) {
    await page.dispatchEvent('canvas#graph-canvas', event, { dataTransfer: data })
  }
  await page.waitForFunction(n => window.app.graph.nodes.length === n, count, { timeout: patience })
}

function drawnNodes(page) {
  return page.evaluate(() =>
    window.app.graph.nodes.map(node => ({
      type: node.type,
      title: node.title,
      known: node.type in window.LiteGraph.registered_node_types,
      widgets: (node.widgets ?? []).map(widget => widget.name),
      values: (node.widgets ?? []).map(widget => widget.value),
    }))
  )
}

async function history(page) {
  return (await page.request.get(options.url + '/history')).json()
}

// Queues through the page's own code, and returns the host's record of the run.
async function queue(page) {
  const before = await history(page)
  await page.evaluate(() => window.app.queuePrompt(0, 1))
  const deadline = Date.now() + patience
  while (Date.now() < deadline) {
    const runs = await history(page)
    const id = Object.keys(runs).find(key => !(key in before))
    if (id) return runs[id]
    await page.waitForTimeout(200)
  }
  throw new Error(`the queued workflow did not end within ${options.seconds} s`)
}

// Pictures that the page itself has loaded onto its nodes.
async function shownPictures(page) {
  const count = () => window.app.graph.nodes.flatMap(node => node.imgs ?? []).filter(img => img.naturalWidth > 0).length
  await page.waitForFunction(count, null, { timeout: patience }).catch(() => {})
  return page.evaluate(count)
}

async function main() {
  const browser = await chromium.launch({
    executablePath: options.chromium,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync'],
  })
  const errors = []
  try {
    const page = await openPage(browser, errors)
    await dropWorkflow(page, options.workflow)
    const nodes = await drawnNodes(page)
    const run = await queue(page)
    const shown = await shownPictures(page)
    const after = await drawnNodes(page)
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView'))
    await page.waitForTimeout(1000) // the canvas glides to the fitted view
    await page.screenshot({ path: options.screenshot })
    const others = {}
    for (const file of options.others) {
      await dropWorkflow(page, file)
      others[file] = await drawnNodes(page)
    }
    const images = Object.values(run.outputs).flatMap(output => output.images ?? [])
    const { status_str: status, messages } = run.status
    console.log(JSON.stringify({ nodes, status, messages, images, shown, after, others, errors }))
  } finally {
    await browser.close()
  }
}

main().catch(error => {
  console.error(String(error))
  process.exit(1)
})
